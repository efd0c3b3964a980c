"""The type of a NumPy array in signatures; its docstring says the shape and dtype."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
