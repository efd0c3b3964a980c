"""The denoiser that controls act in, in eight bits: with the scales, and the layers, that the plain one was given."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle
from ...common.arrays import Array
from ...common.checks import is_finite
from ...common.errors import OverflowedError
from ...common.progress import Progress
from ...engines import Engine
from ..graph import read, read_blocked
from ..scan import Scan, run_steered
from ..sessions import RecordedEngine, as_it_stands, start
from .formats import Format, Scale
from .layers import groups_of
from .probes import Probes
from .write import write

CONTROLLED = "controlled"
"""In the figures of the images: those of one under controls."""
_LARGEST = ":largest"
LEFT_OUT = (0.0, 0.125, 0.25, 0.5)
"""Of the values that are in eight bits without controls, the parts that are left out in turn until the budget holds."""
_STAYS = ", too far: there the denoiser stays as it is beside eight bits"


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

    scales: of the values of both.
    """
    was = read_before(plain, source)
    taken = {value for value in low if value not in was} | {value for value, old in was.items() if old in low}
    return write(source, component, form, scales, taken, f"{form.name}.onnx", shifts)


def read_before(plain: Path, source: Path) -> dict[str, str]:
    """For each value that a layer of the graph `source` reads, what it reads in `plain`; layers are known by name."""
    known = {layer.name: group.value for group in groups_of(read(plain)) for layer in group.layers}
    found = {}
    for group in groups_of(read(source)):
        for layer in group.layers:
            if layer.name in known:
                found[group.value] = known[layer.name]
    return found


def widened(
    scales: Mapping[str, Scale], was: Mapping[str, str], plain: Mapping[str, float], under: Mapping[str, float]
) -> dict[str, Scale]:
    """`scales`, and those of the values that are keys of `was`, wider where a value is larger under controls.

    was: see `read_before`. plain, under: max |x| of the values without controls, and under them.
    """
    found = dict(scales)
    for value, old in was.items():
        if old in scales:
            grown = max(under.get(value, 0.0) / plain[old], 1.0) if plain.get(old) else 1.0
            found[value] = replace(scales[old], value=value, scale=float(np.float32(scales[old].scale * grown)))
    return found


def under_controls(figures: Any) -> str:
    """What `measure` found, in words."""
    if not _are_sound(figures):
        return "the figures under controls are damaged"
    far = "are not finite" if figures["psnr_db"] is None else f"are {figures['psnr_db']:.1f} dB from fp32"
    part = f" with {figures['low']} of {figures['of']} values in eight bits"
    return f"images under controls {far}{part if figures['kept'] else _STAYS}"


def _are_sound(figures: Any) -> bool:
    if not isinstance(figures, dict) or not isinstance(figures.get("kept"), bool):
        return False
    counts = [figures.get("low"), figures.get("of")]
    whole = all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in counts)
    return whole and (figures.get("psnr_db", False) is None or is_finite(figures.get("psnr_db")))


def observe(
    bundle: Bundle, name: str, values: Collection[str], scan: Scan, progress: Progress
) -> tuple[list[Array], dict[str, float]]:
    """A picture under all controls in fp32, and max |x| of these values of the denoiser `name` on the way."""
    path = bundle.path(f"{name}/model.onnx")
    model = read_blocked(path)
    probes, shown = Probes(model.graph), len(model.graph.outputs)
    for value in sorted(values & probes.values.keys()):
        of = probes.values[value]
        probes.give(f"{value}{_LARGEST}", of.producer(), partial(_largest, of), of.dtype, [])
    largest: dict[str, float] = {}

    def add(feeds: Mapping[str, Array], made: Mapping[str, Array]) -> None:
        for key, found in made.items():
            if key.endswith(_LARGEST):
                of = key.removesuffix(_LARGEST)
                largest[of] = max(largest.get(of, 0.0), float(found))

    def engine() -> Engine:
        return RecordedEngine(start(model, path.parent, name), add, shown)

    images = run_steered(bundle, {name: engine}, scan=scan, text="under controls, fp32, step", progress=progress)
    return images, largest


def _largest(value: Any, tape: Any, output: Any) -> None:
    tape.op("ReduceMax", [tape.op("Abs", [value])], {"keepdims": 0}, output=output)


def measure(
    bundle: Bundle, name: str, model: Path, form: Format, scan: Scan, exact: list[Array], progress: Progress
) -> dict[str, Any]:
    """How far the picture under all controls is from `exact`, with the denoiser `name` run as `model` has it."""
    engines, text = {name: partial(as_it_stands, model, name)}, f"under controls, {form.name}, step"
    try:
        found = run_steered(bundle, engines, scan=scan, text=text, progress=progress)
    except OverflowedError as error:
        return {"psnr_db": None, "worst_db": None, "measured": None, "problem": str(error)}
    return replace(scan, prompts=scan.prompts[:1]).figures(found, exact, form.name)
