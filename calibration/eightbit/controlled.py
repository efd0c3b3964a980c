"""The denoiser that controls act in, in eight bits: with the scales, and the layers, that the plain one was given."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...bundle import Bundle
from ...common.arrays import Array
from ...common.errors import OverflowedError
from ...common.progress import Progress
from ..graph import read
from ..scan import Scan, run_steered
from ..sessions import as_it_stands
from .formats import Format, Scale
from .layers import groups_of
from .write import write

CONTROLLED = "controlled"
"""In the figures of the images: those of one under controls."""


LEFT_OUT = (0.0, 0.125, 0.25, 0.5)
"""Of the values that are in eight bits without controls, the parts that are left out in turn until the budget holds."""


def write_controlled(
    plain: Path,
    source: Path,
    component: str,
    form: Format,
    scales: Mapping[str, Scale],
    low: Collection[str],
    shifts: Mapping[str, Array],
) -> list[Path]:
    """Write the graph `source`, which is `plain` with additions, in eight bits where `plain` is; see `write.write`.

    A layer is known by its name. Where one reads a sum that is not in `plain`, the scale is that of what it read there.
    """
    known = {layer.name: group.value for group in groups_of(read(plain)) for layer in group.layers}
    own, taken = dict(scales), set(low)
    for group in groups_of(read(source)):
        value = next((known[layer.name] for layer in group.layers if layer.name in known), None)
        if value != group.value:
            taken.discard(group.value)
        if value in low and value is not None:
            own[group.value] = replace(scales[value], value=group.value)
            taken.add(group.value)
    return write(source, component, form, own, taken, f"{form.name}.onnx", shifts)


def under_controls(figures: Any) -> str:
    """What `measure` found, in words."""
    try:
        far = "are not finite" if figures["psnr_db"] is None else f"are {figures['psnr_db']:.1f} dB from fp32"
        part = f" with {figures['low']} of {figures['of']} values in eight bits"
        stays = part if figures["kept"] else ", too far: there the denoiser stays as it is beside eight bits"
    except (KeyError, TypeError, ValueError, AttributeError):
        return "the figures under controls are damaged"
    return f"images under controls {far}{stays}"


def measure(bundle: Bundle, name: str, model: Path, form: Format, scan: Scan, progress: Progress) -> dict[str, Any]:
    """How far a picture under all controls is from that of fp32, with the denoiser `name` run as `model` has it."""
    draw = partial(run_steered, bundle, scan=scan, progress=progress)
    exact = draw({}, text="under controls, fp32, step")
    try:
        found = draw({name: partial(as_it_stands, model, name)}, text=f"under controls, {form.name}, step")
    except OverflowedError as error:
        return {"psnr_db": None, "worst_db": None, "measured": None, "problem": str(error)}
    return scan.figures(found, exact, form.name)
