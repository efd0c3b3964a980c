"""A large bundle (Stable Diffusion 1.5 size): the loop's overhead over a bare ONNX Runtime call, and peak memory.

python -m diffoundry.examples.random_checkpoint sd15 build/sd15
diffoundry compile build/sd15 -o build/sd15.bundle
python -m diffoundry.bench.large build/sd15.bundle
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..bundle import FULL, STANDARD
from ..common.machine import resident_memory

PROMPT = "a photograph of a harbour at dawn"


@click.command()
@click.argument("bundle")
@click.option("--side", default=512, show_default=True, help="Width and height in pixels.")
@click.option("--steps", default=4, show_default=True)
@click.option("--part", type=click.Choice(["loop", "memory", "ort"]), hidden=True)
def main(bundle: str, side: int, steps: int, part: str | None) -> None:
    """Print the median step of the loop over the median bare call, and the peak memory of `run` over what it needs."""
    if part is not None:
        print(json.dumps({"loop": _loop, "memory": _memory, "ort": _ort}[part](bundle, side, steps)))
        return
    figures = {name: _own_process(bundle, side, steps, name) for name in ("loop", "ort", "memory")}
    loop, ort, memory = figures["loop"], figures["ort"], figures["memory"]
    print(f"bare call {loop['bare']:.2f} s, step of the loop {loop['step']:.2f} s, ratio {loop['ratio']:.3f}")
    needed = ort["weights"] + ort["activations"]
    print(
        f"weights {ort['weights'] / 2**30:.2f} GiB, activations of the U-Net {ort['activations'] / 2**30:.2f} GiB, "
        f"peak of run {memory['peak'] / 2**30:.2f} GiB, ratio {memory['peak'] / needed:.2f}"
    )


def _own_process(bundle: str, side: int, steps: int, part: str) -> dict[str, float]:
    module = "diffoundry.bench.large"
    line = [sys.executable, "-m", module, bundle, "--side", str(side), "--steps", str(steps), "--part", part]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _loop(bundle: str, side: int, steps: int) -> dict[str, float]:
    """Steps of the loop and bare calls of the same session on the same shapes, interleaved."""
    from ..engines.split import SplitEngine
    from ..runtime.pipeline import load

    pipe = load(bundle)
    pipe.encode(["x"])
    pipe.release("text_encoder")
    engine: Any = pipe.engine("unet")
    feeds = _feeds(pipe, side)
    if isinstance(engine, SplitEngine):  # the part that runs at every step
        engine, feeds = engine._per_step, engine._all_feeds(feeds)
    session = engine._session
    session.run(None, feeds)
    bare: list[float] = []
    taken: list[float] = []
    last = [0.0]

    def between(k: int, total: int, latents: Any) -> None:
        now = time.perf_counter()
        if k > 1:
            taken.append(now - last[0])
        start = time.perf_counter()
        session.run(None, feeds)
        bare.append(time.perf_counter() - start)
        last[0] = time.perf_counter()

    pipe(PROMPT, output="latent", steps=steps + 1, width=side, height=side, seed=1, scheduler="euler", callback=between)
    ratios = [a / b for a, b in zip(taken, bare, strict=False)]
    return {"bare": statistics.median(bare), "step": statistics.median(taken), "ratio": statistics.median(ratios)}


def _feeds(pipe: Any, side: int) -> dict[str, Any]:
    manifest = pipe.bundle.manifest
    cells = side // manifest.latents.downscale
    width = next(t.shape[2] for t in pipe.engine("unet").inputs if t.name == "encoder_hidden_states")
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((2, manifest.latents.channels, cells, cells)).astype(np.float32),
        "timestep": np.full(2, 500, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 77, width)).astype(np.float32),
    }


def _ort(bundle: str, side: int, steps: int) -> dict[str, float]:
    """Bytes of the weights, and by how much ONNX Runtime's arena grew for the activations of one U-Net call."""
    from ..runtime.pipeline import load

    pipe = load(bundle)
    smallest = 8 * pipe.bundle.manifest.latents.downscale
    pipe.engine("unet")(_feeds(pipe, smallest))  # touches every weight, so that the next call adds activations alone
    before = resident_memory() or 0
    pipe.engine("unet")(_feeds(pipe, side))
    activations = (resident_memory() or 0) - before
    weights = sum(
        (pipe.bundle.root / name).stat().st_size
        for part in ("text_encoder", "unet", "vae_decoder")
        for name in pipe.bundle.component(part).variants[f"{FULL}/{STANDARD}"].files
    )
    return {"weights": weights, "activations": activations}


def _memory(bundle: str, side: int, steps: int) -> dict[str, float]:
    line = [sys.executable, "-m", "diffoundry", "run", bundle, PROMPT, "--steps", str(steps), "--scheduler", "euler"]
    line += ["--width", str(side), "--height", str(side), "--seed", "1", "-o", str(Path(bundle).parent / "large.png")]
    subprocess.run(line, check=True, capture_output=True)
    return {"peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}


if __name__ == "__main__":
    main()
