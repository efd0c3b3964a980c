"""`diffoundry bench`: starts, pictures and stages, beside other programs and beside the machine's limits."""
