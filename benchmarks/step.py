"""What the step of the loop costs, on the host and as the `step` graph, beside a call of the U-Net.

python -m diffoundry.benchmarks.step build/pico.bundle
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import click
import numpy as np

from ..runtime.device_loop import _contents, _LinkedPhase, _Noise
from ..runtime.guidance import Guidance, combine
from ..runtime.loop import Denoiser, Row
from ..runtime.noise import TorchGenerator
from ..runtime.pipeline import load
from ..runtime.schedulers import make_table
from ..runtime.step import State

PROMPT = "a large red star at the left on a navy background"


@click.command()
@click.argument("bundle")
@click.option("--scheduler", default="dpm++2m", show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--rounds", default=30, show_default=True, help="Loops of each, turn by turn, after two not counted.")
@click.option("--json", "as_json", is_flag=True)
def main(bundle: str, scheduler: str, steps: int, rounds: int, as_json: bool) -> None:
    """Print the median time of a step on the host and of the graph, each as a share of a guided U-Net call."""
    pipe = load(bundle)
    settings = pipe.bundle.manifest.latents
    side = pipe.bundle.manifest.default_width // settings.downscale
    embeddings, _ = pipe.encode([PROMPT, ""])
    table = make_table(pipe.bundle.scheduler_config(), steps, scheduler)
    latents = TorchGenerator(0).randn(settings.channels, side, side) * np.float32(table.init_scale)
    texts = [{"encoder_hidden_states": embedding} for embedding in embeddings]
    row = Row(table, Guidance(7.5), TorchGenerator(0), texts[0], texts[1], latents)
    model = pipe.engine("unet")
    denoiser = Denoiser(model, [row], pipe._pool, pipe._workers)
    contents = _contents(model, [row], (True,), State([table], latents[None]))
    linked = _LinkedPhase(model, pipe.engine("step"), contents, _Noise([row], (0,), steps))
    halves = np.random.default_rng(0).standard_normal((2, *latents.shape)).astype(np.float32)
    drawn = TorchGenerator(1).randn(1, *latents.shape)

    def host() -> float:
        state = State([table], latents[None])
        started = time.perf_counter()
        for k in range(steps):
            state.model_input()
            assert state.timesteps[0] == table.timesteps[k]
            output = combine(halves[1:], halves[:1], [row.guidance])
            state.advance(output, [drawn if draws else None for draws in state.draws])
        return (time.perf_counter() - started) / steps

    def graph() -> float:
        return _seconds(linked._steps[0], steps)

    def unet() -> float:
        return _seconds(lambda: denoiser(latents[None], table.timesteps[:1], (0,), (True,)), steps)

    times = [(host(), graph(), unet()) for _ in range(rounds + 2)][2:]
    medians = [statistics.median(part) for part in zip(*times, strict=True)]
    names = ("host", "graph", "unet")
    figures = {f"{name}_us": 1e6 * value for name, value in zip(names, medians, strict=True)}
    figures |= {f"{name}_share": statistics.median(t[i] / t[2] for t in times) for i, name in enumerate(names[:2])}
    if as_json:
        print(json.dumps(figures))
    else:
        print(f"guided call of the U-Net {figures['unet_us']:.0f} us")
        for name in names[:2]:
            print(f"step, {name}: {figures[f'{name}_us']:.0f} us, {100 * figures[f'{name}_share']:.2f} % of the call")


def _seconds(work: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


if __name__ == "__main__":
    main()
