"""Pico, 20 steps, guidance 7.5, one image: the runtime against diffusers eager, turn by turn in one process.

python -m diffoundry.benchmarks.pico examples/pico build/pico.bundle
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click

from ..engines.onnxruntime import default_threads
from ..runtime.pipeline import load

_PAUSE = 0.05
PROMPT = "a large red star at the left on a navy background"


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call, after a pause in which the threads of the other have stopped to spin."""
    time.sleep(_PAUSE)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@click.command()
@click.argument("checkpoint")
@click.argument("bundle")
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=15, show_default=True, help="Turns of each, after two that are not counted.")
@click.option("--json", "as_json", is_flag=True)
def main(checkpoint: str, bundle: str, steps: int, rounds: int, as_json: bool) -> None:
    """Print the median of the ratio diffusers / diffoundry over turns A B A B …, text encoding, loop and decode."""
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(default_threads())
    theirs = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    ours = load(bundle)

    def run_theirs() -> None:
        generator = torch.Generator().manual_seed(7)
        theirs(PROMPT, num_inference_steps=steps, guidance_scale=7.5, generator=generator)

    def run_ours() -> None:
        ours(PROMPT, steps=steps, guidance=7.5, seed=7)

    pairs = [(seconds(run_theirs), seconds(run_ours)) for _ in range(rounds + 2)][2:]
    ratios = [a / b for a, b in pairs]
    figures = {
        "diffusers_eager_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "diffoundry_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    if as_json:
        print(json.dumps(figures))
    else:
        print(f"diffusers eager {figures['diffusers_eager_ms']:.0f} ms, diffoundry {figures['diffoundry_ms']:.0f} ms")
        print(f"ratio {figures['ratio']:.2f} (from {figures['ratio_min']:.2f} to {figures['ratio_max']:.2f})")


if __name__ == "__main__":
    main()
