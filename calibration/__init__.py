"""Lower precisions whose exceptions are found by measurement."""

from .budget import Budget
from .conversion import convert_models
from .precision import PRECISIONS
from .quality import QualityError
from .scan import Scan
from .sessions import emulation

__all__ = ["PRECISIONS", "Budget", "QualityError", "Scan", "convert_models", "emulation"]
