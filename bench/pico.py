"""Pico, 20 steps, guidance 7.5, one image: the runtime against diffusers eager, turn by turn in one process.

python -m diffoundry.bench.pico examples/pico build/pico.bundle
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
@click.option("--rounds", default=25, show_default=True, help="Turns of each, after two that are not counted.")
@click.option("--json", "as_json", is_flag=True)
def main(checkpoint: str, bundle: str, steps: int, rounds: int, as_json: bool) -> None:
    """Print the median of the ratio diffusers / diffoundry over turns A B A B …

    Once of the loop and the decode to a picture, with the prompt encoded beforehand, and once of the whole call.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(default_threads())
    theirs = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    ours = load(bundle)

    def generator() -> Any:
        return torch.Generator().manual_seed(7)

    options = {"num_inference_steps": steps, "guidance_scale": 7.5}
    encoded = dict(
        zip(("prompt_embeds", "negative_prompt_embeds"), theirs.encode_prompt(PROMPT, "cpu", 1, True), strict=True)
    )

    def our_loop() -> float:
        time.sleep(_PAUSE)
        spent = ours(PROMPT, steps=steps, guidance=7.5, seed=7).seconds
        return spent["loop"] + spent["decoder"]

    def pairs(a: Callable[[], float], b: Callable[[], float]) -> list[tuple[float, float]]:
        return [(a(), b()) for _ in range(rounds + 2)][2:]

    figures = {
        "loop and decode": _summary(
            pairs(lambda: seconds(lambda: theirs(**encoded, **options, generator=generator())), our_loop)
        ),
        "whole call": _summary(
            pairs(
                lambda: seconds(lambda: theirs(PROMPT, **options, generator=generator())),
                lambda: seconds(lambda: ours(PROMPT, steps=steps, guidance=7.5, seed=7)),
            )
        ),
    }
    if as_json:
        print(json.dumps(figures))
        return
    for name, part in figures.items():
        print(
            f"{name}: diffusers eager {part['diffusers_eager_ms']:.0f} ms, diffoundry {part['diffoundry_ms']:.0f} ms, "
            f"ratio {part['ratio']:.2f} (quartiles {part['ratio_low']:.2f} to {part['ratio_high']:.2f})"
        )


def _summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "diffusers_eager_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "diffoundry_ms": 1e3 * statistics.median(b for _, b in pairs),
        "ratio": middle,
        "ratio_low": low,
        "ratio_high": high,
    }


if __name__ == "__main__":
    main()
