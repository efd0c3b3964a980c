"""What the step of the loop costs, on the host and as the `step` graph, beside a call of the U-Net.

python -m diffoundry.bench.step build/pico.bundle
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import click
import numpy as np

from ..engines.onnxruntime import default_threads
from ..runtime.loop.guidance import Guidance, combine
from ..runtime.loop.host import HostStepper
from ..runtime.loop.noise import TorchGenerator
from ..runtime.loop.sample import Row, Sample
from ..runtime.loop.step import State, step_inputs
from ..runtime.pipeline import load
from ..runtime.schedulers import make_table

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
    row = Row(0, Sample(table, Guidance(7.5), TorchGenerator(0), texts[0], texts[1], latents))
    workers = default_threads() - 1
    pool = ThreadPoolExecutor(workers) if workers else None
    stepper = HostStepper(pipe.engine("unet"), pool=pool, workers=workers)
    halves = np.random.default_rng(0).standard_normal((2, *latents.shape)).astype(np.float32)
    drawn = TorchGenerator(1).randn(*latents.shape)
    step = pipe.engine("step")
    feeds = {
        **step_inputs([row.state]),
        "model_output": halves,
        "noise": drawn[None],
        "prompt_row": np.array([1]),
        "negative_row": np.array([0]),
        "source": np.array([0, 0]),
        "guidance": np.array([7.5], np.float32),
        "rescale": np.zeros(1, np.float32),
    }
    bound = step.bind_device({name: step.to_device(array) for name, array in {**feeds, **step(feeds)}.items()})

    def host() -> float:
        state = State(table, latents)
        started = time.perf_counter()
        for k in range(steps):
            state.model_input()
            assert state.timestep == table.timesteps[k]
            output = combine(halves[1:], halves[:1], [row.sample.guidance])
            state.advance(output[0], drawn if state.draws() else None)
        return (time.perf_counter() - started) / steps

    def graph() -> float:
        return _seconds(bound, steps)

    def unet() -> float:
        return _seconds(lambda: stepper.predict([row]), steps)

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
