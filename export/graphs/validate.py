"""Hold a traced component against torch on random shapes and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...common.arrays import Array
from ...common.errors import CheckpointError
from ...engines import Engine
from .spec import ComponentSpec

CASES = 3
TOLERANCE = 1e-4
"""Largest absolute difference to torch, as a fraction of the largest output value (and at least of 1)."""

Case = tuple[dict[str, Array], dict[str, Array]]


def torch_cases(spec: ComponentSpec, module: Any) -> list[Case]:
    """Inputs of `CASES` random shapes and what torch makes of them. The first case is the smallest allowed."""
    import torch

    rng = np.random.default_rng(abs(hash_name(spec.name)))
    cases = []
    for i in range(CASES):
        feeds = spec.feeds(spec.smallest() if i == 0 else spec.sizes(rng), rng)
        with torch.no_grad():
            result = module(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        values = result if isinstance(result, tuple) else (result,)
        if not all(torch.isfinite(value).all() for value in values):
            raise CheckpointError(
                f"{spec.name}: torch's own values are not finite (NaN or infinity): the weights are damaged, "
                "download the checkpoint again"
            )
        cases.append((feeds, {t.name: v.numpy() for t, v in zip(spec.outputs, values, strict=True)}))
    return cases


def hash_name(name: str) -> int:
    """A small number from a name, the same in every process."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(name))


def compare(component: str, engine: Engine, cases: list[Case]) -> dict[str, Any]:
    """Run the cases of `component` on `engine` and report the differences.

    Raises `CheckpointError` when one is above `TOLERANCE`.
    """
    report = []
    for feeds, expected in cases:
        found = engine(feeds)
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        for name, reference in expected.items():
            if found[name].shape != reference.shape:
                raise CheckpointError(
                    f"{component}: output {name!r} has shape {found[name].shape}, "
                    f"the reference {reference.shape} for {shapes}"
                )
            largest = float(np.abs(reference).max())
            error = float(np.abs(found[name] - reference).max())
            report.append({"inputs": shapes, "output": name, "max_abs_error": error, "max_abs_reference": largest})
            if not error <= TOLERANCE * max(1.0, largest):
                raise CheckpointError(
                    f"{component}: output {name!r} differs from the reference by {error:.3g} "
                    f"(values up to {largest:.3g}, "
                    f"allowed {TOLERANCE:g} of that) for {shapes}: the trace is wrong, do not use it"
                )
    return {"tolerance": TOLERANCE, "cases": report}
