"""`diffoundry serve`: a server whose rows come and go between steps."""
