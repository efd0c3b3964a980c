"""The precisions that a model can be written in, one table for all rooms."""

from __future__ import annotations

from ..common.errors import DiffoundryError

FULL = "fp32"
"""The precision that models are traced in."""
PRECISIONS = {FULL: 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 1e-1, "fp8": 2e-1}
"""For each the largest absolute difference of an output to what torch gave, as a fraction of its largest value.

That of fp32 is what `compile` allows; those of 16 bits are about ten roundings of the type, that of 8 bits is
four times what was measured of whole denoisers.
"""
EIGHT_BIT = ("int8", "fp8")
"""Those that only the denoiser is in; all else is in fp32 or bf16 on the processor, and in fp16 on a GPU."""
AS_STORED = "auto"
STORAGE_DTYPES = (FULL, AS_STORED)
"""In what type the weights of the models in float32 are kept: float32, or that of the checkpoint."""

FULL_MODEL, TWIN = "full", "twin"
VALIDATIONS = (FULL_MODEL, TWIN)
"""What of a component that has a twin is held against torch: all of it, or a few of its layers."""
FULL_SHARE = 2.5
"""Of the bytes of the weights, what holding a whole component against torch takes of memory."""


def check_precision(name: object) -> str:
    """`name`. Raises `DiffoundryError` for an unknown precision."""
    if not isinstance(name, str) or name not in PRECISIONS:
        raise DiffoundryError(f"unknown precision {name!r}: choose one of {', '.join(PRECISIONS)}")
    return name
