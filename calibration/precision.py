"""The lower precisions: what each can hold, and what a node may lose in it."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import DiffoundryError

MASK = 1e30
"""A finite constant from here on stands for infinity: it masks scores. No weight or activation is as large."""
MARGIN = 2.0
"""Other prompts and seeds reach further than those that were measured: the largest value may grow by this factor."""


@dataclass(frozen=True, slots=True)
class Precision:
    """A floating-point type of 16 bits.

    dtype: its name in ONNX. largest: its largest finite value. opset: the first in which the operators of these
    models admit it. threshold: the signal-to-noise ratio, in dB, under which a node is kept in float32.
    """

    name: str
    dtype: str
    largest: float
    opset: int
    threshold: float

    @property
    def limit(self) -> float:
        """The largest magnitude measured that may be kept in this type."""
        return self.largest / MARGIN


# Rounding alone gives 73 dB in fp16 and 55 dB in bf16. Measured on the trained pico and on random models of the
# topology of SD1.5, SDXL and its refiner, the sine and cosine of timesteps come out at 25–39 dB in fp16 and 5–12 dB in
# bf16, and every other node at 57 dB and 38 dB or more. The thresholds lie in these gaps, 23 dB under rounding alone.
PRECISIONS = {
    "fp16": Precision("fp16", "FLOAT16", 65504.0, 13, 50.0),
    "bf16": Precision("bf16", "BFLOAT16", 3.3895313892515355e38, 22, 32.0),
}


def precision_of(name: str) -> Precision:
    """The precision called `name`. Raises `DiffoundryError` for one that calibration does not write."""
    try:
        return PRECISIONS[name]
    except (KeyError, TypeError):
        raise DiffoundryError(f"unknown precision {name!r}: choose one of {', '.join(PRECISIONS)}") from None
