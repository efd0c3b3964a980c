"""Lower precisions whose exceptions are found by measurement."""

from .lowering import RULE, lower
from .precision import PRECISIONS, Precision
from .quality import QualityError
from .scan import BUDGET_DB, DEFAULT_PROMPTS, Scan
from .sessions import emulation
from .typed import Typed

__all__ = [
    "BUDGET_DB",
    "DEFAULT_PROMPTS",
    "PRECISIONS",
    "RULE",
    "Precision",
    "QualityError",
    "Scan",
    "Typed",
    "emulation",
    "lower",
]
