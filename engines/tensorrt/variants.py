"""Which model of a component TensorRT builds from."""

from __future__ import annotations

from ...bundle import EIGHT_BIT, FULL, Component, Variant

BACKEND = "tensorrt"
"""In the key of a variant: both of its kinds."""
BESIDE = "fp16"
"""What is in, on a GPU, what is not in eight bits."""


def model_of(component: Component, precision: str) -> tuple[str, Variant | None]:
    """The precision that `component` is built in where `precision` is asked for, and its model."""
    if precision in EIGHT_BIT:
        found = component.variants.get(f"{precision}/{BACKEND}")
        if found is not None:
            return precision, found
        precision = BESIDE
    own = precision if component.variant(precision) is not None else FULL
    return own, component.variant(own)
