"""Lower precisions whose exceptions are found by measurement."""

from .conversion import RULE, convert_models
from .precision import PRECISIONS, Precision
from .quality import QualityError
from .rewrite import ConvertedModel
from .scan import BUDGET_DB, DEFAULT_PROMPTS, Scan
from .sessions import emulation

__all__ = [
    "BUDGET_DB",
    "DEFAULT_PROMPTS",
    "PRECISIONS",
    "RULE",
    "ConvertedModel",
    "Precision",
    "QualityError",
    "Scan",
    "convert_models",
    "emulation",
]
