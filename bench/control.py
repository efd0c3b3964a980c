"""What controls cost: a call of the denoiser without one, and with one against the bare calls of the two models.

python -m diffoundry.bench.control BUNDLE
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

import click
import numpy as np

from ..bundle import Bundle
from ..common.arrays import Array
from ..common.errors import BundleError, DiffoundryError, EngineError
from ..engines.controlled import ControlledEngine
from ..engines.engine import Engine
from ..engines.loader import EngineLoader
from ..engines.names import ONNXRUNTIME, PLANNED, EngineName
from ..families.control import halved

_ROWS = 2


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--engine", default=ONNXRUNTIME, show_default=True, help="onnxruntime or openvino.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(3))
def main(bundle: Path, engine: str, rounds: int) -> None:
    """Time a guided call at the checkpoint's size, turn by turn, and print medians with quartiles."""
    try:
        _time(Bundle.open(bundle), engine, rounds)
    except DiffoundryError as error:
        raise click.ClickException(str(error)) from None


def _time(opened: Bundle, engine: str, rounds: int) -> None:
    manifest = opened.manifest
    if not manifest.wiring.controls:
        raise BundleError(f"{opened.root} has no control: compile the checkpoint with --controlnet NAME=FOLDER")
    if EngineName.parse(engine).backend in PLANNED:
        raise EngineError(f"this times ONNX models, not the plans of {engine}: use --engine onnxruntime or openvino")
    loader = EngineLoader(opened, engine, "fp32")
    plain, controlled = (loader.load(manifest.named(role)) for role in ("denoiser", "controlled"))
    name = next(iter(manifest.wiring.controls.values())).component
    control = loader.load(name)
    prompts = manifest.wiring.image_prompts.values()
    own = [*(tensor.name for tensor in plain.inputs), *(name for each in prompts for name in each.inputs)]
    both = ControlledEngine(controlled, {name: control}, own)
    sizes = {"height": manifest.default_height, "width": manifest.default_width}
    engines = {"plain denoiser": plain, "controlled denoiser": controlled, "control": control, "both as one": both}
    calls = {label: bound(each, sizes, manifest.latents.downscale) for label, each in engines.items()}
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[label].append(time.perf_counter() - start)
    for label, found in seconds.items():
        _show(label, [1000 * each for each in found], "ms")
    bare = [a + b for a, b in zip(seconds["controlled denoiser"], seconds["control"], strict=True)]
    _show("both as one / two bare calls", [a / b for a, b in zip(seconds["both as one"], bare, strict=True)], "")


def _show(label: str, values: list[float], unit: str) -> None:
    low, middle, high = quantiles(values, n=4)
    print(f"{label:<30}{middle:10.3f} ({low:.3f}-{high:.3f}) {unit}".rstrip())


def bound(
    engine: Engine, pixels: dict[str, int], downscale: int, given: Mapping[str, Array] | None = None
) -> Callable[[], Any]:
    """A call of `engine` on random inputs beside those given, of which latents and timestep change."""
    latents = {axis: size // downscale for axis, size in pixels.items()}
    sizes = {"batch_size": _ROWS, "sequence_length": 77, **halved(latents)}
    sizes |= {f"sample_{axis}": size for axis, size in pixels.items()}
    rng = np.random.default_rng(0)
    feeds = dict(given or {})
    for tensor in (tensor for tensor in engine.inputs if tensor.name not in feeds):
        shape = [sizes.get(axis, 4) if isinstance(axis, str) else axis for axis in tensor.shape]
        feeds[tensor.name] = rng.random(shape).astype(tensor.dtype)
    binding = engine.bind_host(feeds)
    for _ in range(2):
        binding(*feeds)
    return lambda: binding("sample", "timestep")


if __name__ == "__main__":
    main()
