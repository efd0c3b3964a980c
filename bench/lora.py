"""What a change of LoRAs costs, beside diffusers' load and fuse in the same run, and what a step costs that takes them.

python -m diffoundry.bench.lora BUNDLE CHECKPOINT

BUNDLE is compiled from CHECKPOINT. Files of random weights are made; each way, its denoiser loaded, takes one after
another, each in place of the one before, in a process of its own. Its peak memory is told beside what it was before
the first change.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import numpy as np

from ..common.errors import DiffoundryError
from ..engines.onnxruntime import default_threads
from ..runtime.lora import Lora
from ..runtime.pipeline import load
from .control import bound

_WAYS = {
    "hot": "ours: set_loras",
    "inputs": "ours: set_loras, as_inputs=True",
    "weights": "ours: set_loras, as_inputs=False",
    "diffusers": "diffusers: load_lora_weights, set_adapters, fuse_lora",
}
_AS_INPUTS = {"hot": None, "inputs": True, "weights": False}


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--rank", default=16, show_default=True, type=click.IntRange(1))
@click.option("--layers", default="attention", show_default=True, type=click.Choice(["attention", "all"]))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(3), help="Changes of each way.")
@click.option("--calls", default=5, show_default=True, type=click.IntRange(0), help="Timed calls of each denoiser.")
@click.option("--worker", hidden=True, type=click.Choice(list(_WAYS)))
@click.option("--files", hidden=True, type=click.Path(path_type=Path))
def main(
    bundle: Path,
    checkpoint: Path,
    rank: int,
    layers: str,
    rounds: int,
    calls: int,
    worker: str | None,
    files: Path | None,
) -> None:
    """Print seconds of a change, peak memory, and the cost of a step."""
    try:
        if worker is not None and files is not None:
            print(json.dumps(_change(worker, bundle, checkpoint, sorted(files.iterdir()), rounds)))
            return
        pipe = load(bundle, engine="onnxruntime", precision="fp32")
        ways = [way for way in _WAYS if way != "inputs" or pipe.lora_denoiser]
        with tempfile.TemporaryDirectory(prefix="diffoundry-") as folder:
            for i in range(rounds):  # so that none is read before
                _write(checkpoint, Path(folder) / f"{i}.safetensors", rank, layers, i)
            found = {way: _run(way, bundle, checkpoint, folder, rounds) for way in ways}
            _show(found)
            if calls and "inputs" in ways:
                _time_steps(pipe, sorted(Path(folder).iterdir())[0], calls)
    except DiffoundryError as error:
        raise click.ClickException(str(error)) from None


def _write(checkpoint: Path, file: Path, rank: int, layers: str, seed: int) -> None:
    """A LoRA of random weights for the U-Net, in diffusers' layout and fp16."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(seed), {}
    for path in sorted((checkpoint / "unet").glob("*.safetensors")):
        with safe_open(path, framework="np") as held:
            names = [name for name in held.keys() if name.endswith(".weight")]  # noqa: SIM118
            shapes = {name: held.get_slice(name).get_shape() for name in names}
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            attends = module.endswith(("to_q", "to_k", "to_v", "to_out.0"))
            if len(shape) in (2, 4) and (layers == "all" or attends):
                down, up = (rank, *shape[1:]), (shape[0], rank, *[1] * (len(shape) - 2))
                tensors[f"unet.{module}.lora_A.weight"] = (0.02 * rng.standard_normal(down)).astype(np.float16)
                tensors[f"unet.{module}.lora_B.weight"] = (0.02 * rng.standard_normal(up)).astype(np.float16)
    save_file(tensors, file)


def _run(way: str, bundle: Path, checkpoint: Path, files: str, rounds: int) -> dict[str, Any]:
    line = [sys.executable, "-m", __spec__.name, str(bundle), str(checkpoint), "--worker", way, "--files", files]
    done = subprocess.run([*line, "--rounds", str(rounds)], capture_output=True, text=True)
    if done.returncode:
        raise DiffoundryError(f"{way}: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _change(way: str, bundle: Path, checkpoint: Path, files: list[Path], rounds: int) -> dict[str, Any]:
    """Seconds of each change, and peak memory before and after, in GB."""
    change = _theirs(checkpoint) if way == "diffusers" else _ours(bundle, _AS_INPUTS[way])
    before, seconds = _peak(), []
    for i in range(rounds):
        start = time.perf_counter()
        change(files[i], i)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "loaded": before, "peak": _peak()}


def _ours(bundle: Path, as_inputs: bool | None) -> Callable[[Path, int], None]:
    """A change of the LoRA, until the denoiser is ready to be called with it. The plain one is loaded before."""
    pipe = load(bundle, engine="onnxruntime", precision="fp32")
    plain, adapted = pipe.bundle.manifest.named("denoiser"), pipe.lora_denoiser
    pipe.engine(plain)

    def change(file: Path, i: int) -> None:
        pipe.set_loras([Lora(file, 0.8 + 0.01 * i)], as_inputs=as_inputs)
        pipe.engine(adapted if pipe._sets.base else plain)

    return change


def _theirs(checkpoint: Path) -> Callable[[Path, int], None]:
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(default_threads())
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)

    def change(file: Path, i: int) -> None:
        if i:
            unet.unfuse_lora()
            unet.unload_lora()
        unet.load_lora_adapter(str(file), prefix="unet", adapter_name=f"lora_{i}")
        unet.set_adapters([f"lora_{i}"], [0.8])
        unet.fuse_lora(adapter_names=[f"lora_{i}"])

    return change


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _show(found: dict[str, dict[str, Any]]) -> None:
    theirs = median(found["diffusers"]["seconds"][1:])
    print(f"{'a change, after the first':<58}{'seconds':>9}{'first':>8}{'of theirs':>11}{'GB':>7}{'loaded':>8}")
    for way, each in found.items():
        first, *rest = each["seconds"]
        print(
            f"{_WAYS[way]:<58}{median(rest):>9.3f}{first:>8.3f}{median(rest) / theirs:>11.3f}{each['peak']:>7.2f}"
            f"{each['loaded']:>8.2f}"
        )


def _time_steps(pipe: Any, file: Path, calls: int) -> None:
    """A guided call of the plain denoiser, and of the one that takes LoRAs, turn by turn."""
    manifest = pipe.bundle.manifest
    pipe.set_loras([Lora(file)], as_inputs=True)
    inputs = pipe._sets.inputs(pipe._sets.layout(pipe.loras))
    down, up = pipe._sets.factors(pipe.loras)
    factors = {inputs.down: down[None], inputs.up: up[None]}
    pixels, downscale = {"height": manifest.default_height, "width": manifest.default_width}, manifest.latents.downscale
    plain, adapted = pipe.engine(manifest.named("denoiser")), pipe.engine(pipe.lora_denoiser)
    first, second = bound(plain, pixels, downscale), bound(adapted, pixels, downscale, factors)
    seconds: dict[str, list[float]] = {"plain": [], "with LoRA": []}
    for _ in range(calls):
        for label, call in (("plain", first), ("with LoRA", second)):
            start = time.perf_counter()
            call()
            seconds[label].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    print(
        f"a guided call: plain {1000 * median(seconds['plain']):.1f} ms, with factors "
        f"{1000 * median(seconds['with LoRA']):.1f} ms, ratio {middle:.3f} ({low:.3f}-{high:.3f})"
    )
    changes = []
    sets = [Lora(file, 0.5)], [Lora(file)]
    for i in range(20):
        start = time.perf_counter()
        pipe.set_loras(sets[i % 2], as_inputs=True)
        changes.append(time.perf_counter() - start)
    print(f"a change to a set that was used before: {1000 * median(changes[4:]):.3f} ms")


if __name__ == "__main__":
    main()
