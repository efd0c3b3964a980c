"""What a pipeline is, read from its configurations alone; nothing here needs torch."""

from .family import Configs, Family, Part, Pipeline
from .known import FAMILIES, family_named, family_of
from .optimum import open_bundle

__all__ = ["FAMILIES", "Configs", "Family", "Part", "Pipeline", "family_named", "family_of", "open_bundle"]
