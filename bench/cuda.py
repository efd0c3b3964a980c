"""`onnxruntime:cuda` against PyTorch on one GPU: a guided call of the U-Net, whole pictures, shapes in turn, memory.

python -m diffoundry.examples.random_checkpoint sd15 build/sd15
diffoundry compile build/sd15 -o build/sd15.bundle --engine onnxruntime:cuda --precision fp16
python -m diffoundry.bench.cuda build/sd15 build/sd15.bundle

Each part runs in a process of its own, and prints a JSON object a line as soon as it is measured. With `--device cpu`
the same is done on the processor, which shows that it runs and nothing else.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from ..common.arrays import Array
from ..engines import DeviceBinding, Engine
from ..engines.loader import EngineLoader
from ..engines.names import ONNXRUNTIME
from ..runtime.pipeline import load

PROMPT = "a photograph of a harbour at dawn"
_WARM = 4


@dataclass(frozen=True, slots=True)
class Run:
    """What all parts are told. device: `cuda` or `cpu`. scratch: a folder that all parts see. many: pictures."""

    checkpoint: str
    bundle: str
    side: int
    steps: int
    runs: int
    device: str
    scratch: Path
    many: int = 500

    @property
    def engine(self) -> str:
        """Ours on the device."""
        return f"{ONNXRUNTIME}:cuda" if self.device == "cuda" else ONNXRUNTIME


def _say(name: str, milliseconds: list[float], **more: Any) -> None:
    ordered = sorted(milliseconds)
    row = {"what": name, "median_ms": statistics.median(ordered), "min_ms": ordered[0], "max_ms": ordered[-1], **more}
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def _timed(work: Callable[[], object], runs: int) -> list[float]:
    """Milliseconds of each of `runs` calls of `work`, which ends when all is done, after some that are not counted."""
    for _ in range(_WARM):
        work()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start))
    return taken


def _feeds(run: Run) -> dict[str, Array]:
    """Inputs of a guided call for one picture of this size."""
    bundle = load(run.bundle, engine=ONNXRUNTIME, precision="fp32").bundle
    cells = run.side // bundle.manifest.latents.downscale
    sizes = {"batch_size": 2, "height": cells, "width": cells, "sequence_length": 77}
    rng = np.random.default_rng(0)
    feeds = {}
    for tensor in bundle.component("unet").inputs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
        fixed = {"timestep": 500.0, "time_ids": float(run.side)}.get(tensor.name)
        made = rng.standard_normal(shape) if fixed is None else np.full(shape, fixed)
        feeds[tensor.name] = made.astype(np.float32)
    return feeds


def _decibels(found: Array, scratch: Path) -> float | None:
    """The signal-to-noise ratio of an output to that of torch in float32."""
    path = scratch / "reference.npy"
    if not path.is_file():
        return None
    exact = np.load(path).astype(np.float64)
    return float(10 * np.log10(np.mean(exact**2) / max(float(np.mean((exact - found) ** 2)), 1e-30)))


def _torch_call(run: Run, dtype: str) -> Callable[[], Any]:
    import torch
    from diffusers import UNet2DConditionModel

    kind = getattr(torch, dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    unet = UNet2DConditionModel.from_pretrained(Path(run.checkpoint) / "unet", torch_dtype=kind).to(run.device).eval()
    if dtype != "float32":
        unet.to(memory_format=torch.channels_last)
    given = {
        k: torch.from_numpy(v).to(run.device, torch.float32 if k == "timestep" else kind)
        for k, v in _feeds(run).items()
    }
    given["sample"] = given["sample"].contiguous(memory_format=torch.channels_last)
    added = {k: given[k] for k in ("text_embeds", "time_ids") if k in given} or None
    positional = given["sample"], given["timestep"], given["encoder_hidden_states"]

    def call() -> Any:
        return unet(*positional, added_cond_kwargs=added, return_dict=False)[0]

    return call


def _synchronized(run: Run, call: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    def work() -> Any:
        with torch.no_grad():
            made = call()
        if run.device == "cuda":
            torch.cuda.synchronize()
        return made

    return work


def call_torch(run: Run) -> None:
    """PyTorch eager: float32 without TF32, which the others are held against, then half precision."""
    exact = _synchronized(run, _torch_call(run, "float32"))
    _say("torch eager fp32", _timed(exact, max(2, run.runs // 4)))
    np.save(run.scratch / "reference.npy", exact().float().cpu().numpy())
    half = _synchronized(run, _torch_call(run, "float16" if run.device == "cuda" else "bfloat16"))
    _say("torch eager half", _timed(half, run.runs), db=_decibels(half().float().cpu().numpy(), run.scratch))


def call_compile(run: Run) -> None:
    """torch.compile in the mode that captures CUDA graphs."""
    import torch

    call = _torch_call(run, "float16" if run.device == "cuda" else "bfloat16")
    start = time.perf_counter()
    compiled = _synchronized(run, torch.compile(call, mode="reduce-overhead" if run.device == "cuda" else "default"))
    compiled()
    took = time.perf_counter() - start
    made = _timed(compiled, run.runs)
    _say("torch.compile half", made, db=_decibels(compiled().float().cpu().numpy(), run.scratch), compile_s=took)


def _bound(run: Run, engine: Engine) -> tuple[DeviceBinding, Callable[[], Array]]:
    """A guided call bound on the device, and what waits for it and gives its output."""
    feeds, output = _feeds(run), engine.outputs[0].name
    tensors = {name: engine.to_device(array) for name, array in feeds.items()}
    tensors[output] = engine.to_device(np.zeros_like(feeds["sample"]))
    return engine.bind_device(tensors), tensors[output].numpy


def call_ours(run: Run) -> None:
    """Ours, with what stays on the device bound once: launched node by node, then captured."""
    start = time.perf_counter()
    engine = EngineLoader(load(run.bundle, engine=run.engine).bundle, run.engine).load("unet")
    loaded = time.perf_counter() - start
    binding, wait = _bound(run, engine)
    for name, launch in (("ours, node by node", binding), ("ours, captured", engine.capture(binding, "a call"))):

        def work(launch: Callable[[], None] = launch) -> Array:
            launch()
            return wait()

        start = time.perf_counter()
        work()
        first = time.perf_counter() - start
        _say(name, _timed(work, run.runs), db=_decibels(work(), run.scratch), load_s=loaded, first_s=first)


def call_provider(run: Run) -> None:
    """The same graph captured by the provider itself (`enable_cuda_graph`), which waits after each call."""
    import onnxruntime as ort

    bundle = load(run.bundle, engine=run.engine).bundle
    precision = bundle.manifest.precision if run.device == "cuda" else "fp32"
    variant = bundle.component("unet").variant(precision, f"{ONNXRUNTIME}:{run.device}")
    assert variant is not None
    options = ort.SessionOptions()
    options.log_severity_level = 4
    given: Any = "CPUExecutionProvider"
    if run.device == "cuda":
        given = (
            "CUDAExecutionProvider",
            {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "enable_cuda_graph": "1"},
        )

    def session(path: str) -> Any:
        return ort.InferenceSession(str(bundle.path(path)), options, providers=[given])

    feeds, step = _feeds(run), session(variant.model)
    if variant.per_prompt:
        once = session(variant.per_prompt)
        own = ort.RunOptions()
        own.add_run_config_entry("gpu_graph_id", "-1")
        made = once.run(None, {each.name: feeds[each.name] for each in once.get_inputs()}, own)
        feeds |= dict(zip((each.name for each in once.get_outputs()), made, strict=True))
    bound, held = step.io_binding(), []
    for each in step.get_inputs():
        held.append(ort.OrtValue.ortvalue_from_numpy(np.asarray(feeds[each.name], order="C"), run.device, 0))
        bound.bind_ortvalue_input(each.name, held[-1])
    output = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(feeds["sample"]), run.device, 0)
    bound.bind_ortvalue_output(step.get_outputs()[0].name, output)
    taken = _timed(lambda: step.run_with_iobinding(bound), run.runs)
    _say("ours, captured by the provider", taken, db=_decibels(output.numpy(), run.scratch))


def _pictures_of_diffusers(run: Run, compiled: bool) -> None:
    import torch
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    kind = torch.float16 if run.device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(run.checkpoint, torch_dtype=kind).to(run.device)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        mode = "reduce-overhead" if run.device == "cuda" else "default"
        pipe.unet, pipe.vae.decode = (torch.compile(part, mode=mode) for part in (pipe.unet, pipe.vae.decode))
    options = {"num_inference_steps": run.steps, "guidance_scale": 7.5, "width": run.side, "height": run.side}

    def draw() -> Any:
        return pipe(PROMPT, **options, generator=torch.Generator("cpu").manual_seed(0)).images[0]

    taken = _timed(draw, run.runs)
    peak = torch.cuda.max_memory_allocated() / 2**30 if run.device == "cuda" else None
    _say(f"pictures, diffusers {'torch.compile' if compiled else 'eager'}", taken, peak_gib=peak)


def pictures_ours(run: Run) -> None:
    """Prompt to picture, and the share of the loop that is more than as many calls of the U-Net one after another."""
    start = time.perf_counter()
    pipe = load(run.bundle, engine=run.engine)
    before = _free_memory(run)
    options = {"steps": run.steps, "guidance": 7.5, "width": run.side, "height": run.side, "seed": 0}
    pipe(PROMPT, scheduler="euler", **options)
    first = time.perf_counter() - start
    loops: list[float] = []

    def draw() -> None:
        loops.append(1000 * pipe(PROMPT, scheduler="euler", **options).seconds["loop"])

    taken = _timed(draw, run.runs)
    used = None if before is None else (before - (_free_memory(run) or 0)) / 2**30
    engine = pipe.engine("unet")
    binding, wait = _bound(run, engine)

    def enqueue() -> None:
        for _ in range(run.steps):
            binding()

    launch = engine.capture(enqueue, "calls")

    def calls() -> None:
        launch()
        wait()

    loop, busy = statistics.median(loops[_WARM:]), statistics.median(_timed(calls, run.runs))
    more = {"first_s": first, "loop_ms": loop, "beside_calls": 1 - busy / loop, "used_gib": used}
    _say("pictures, ours", taken, **more, captured=pipe.info().get("captured"))


def batches(run: Run) -> None:
    """Pictures a second for 1, 2, 4 and 8 at once."""
    pipe = load(run.bundle, engine=run.engine)
    options = {"steps": run.steps, "width": run.side, "height": run.side, "scheduler": "euler", "seed": 0}
    for images in (1, 2, 4, 8):
        draw = partial(pipe, PROMPT, count=images, batch=images, **options)
        taken = _timed(draw, max(2, run.runs // 2))
        _say(f"{images} pictures at once", taken, pictures_a_second=1000 * images / statistics.median(taken))


def shapes(run: Run) -> None:
    """Eight sizes in turn over each of them by itself."""
    pipe = load(run.bundle, engine=run.engine)
    unit = max(64, pipe.bundle.manifest.latents.unit)
    sizes = [(run.side + unit * (i % 4), run.side + unit * (i // 4)) for i in range(8)]

    def draw(size: tuple[int, int]) -> float:
        start = time.perf_counter()
        pipe(PROMPT, steps=run.steps, width=size[0], height=size[1], scheduler="euler", seed=0)
        return 1000 * (time.perf_counter() - start)

    alone = []
    for size in sizes:
        for _ in range(_WARM):
            draw(size)
        alone.append(statistics.median(draw(size) for _ in range(run.runs)))
    turns = [[draw(size) for size in sizes] for _ in range(run.runs)]
    in_turn = [statistics.median(column) for column in zip(*turns, strict=True)]
    ratios = [a / b for a, b in zip(in_turn, alone, strict=True)]
    _say("eight sizes in turn", in_turn, over_alone=statistics.median(ratios), worst_over_alone=max(ratios))


def memory(run: Run) -> None:
    """By how much the memory of the device grows from 10 pictures to many, of a step each."""
    pipe = load(run.bundle, engine=run.engine)
    free = []
    for count in range(1, run.many + 1):
        pipe(PROMPT, steps=1, width=run.side, height=run.side, scheduler="euler", seed=count, output="latent")
        if count in (10, run.many):
            free.append(_free_memory(run))
    grown = None if free[0] is None else (free[0] - (free[1] or 0)) / 2**20
    print(json.dumps({"what": f"memory grown from 10 to {run.many} pictures", "mib": grown}), flush=True)


def _free_memory(run: Run) -> int | None:
    if run.device != "cuda":
        return None
    from ..engines.gpu.gpu import shared

    return int(shared().device.call("cudaMemGetInfo")[0])


_RUN: dict[str, Callable[[Run], None]] = {
    "call-torch": call_torch,
    "call-compile": call_compile,
    "call-ours": call_ours,
    "call-provider": call_provider,
    "pictures-eager": partial(_pictures_of_diffusers, compiled=False),
    "pictures-compile": partial(_pictures_of_diffusers, compiled=True),
    "pictures-ours": pictures_ours,
    "batches": batches,
    "shapes": shapes,
    "memory": memory,
}


@click.command()
@click.argument("checkpoint")
@click.argument("bundle")
@click.option("--side", default=512, show_default=True, help="Width and height in pixels.")
@click.option("--steps", default=20, show_default=True)
@click.option("--runs", default=20, show_default=True, help="Measurements of each, after some that are not counted.")
@click.option("--only", default="all", show_default=True, help=f"Of {', '.join(_RUN)}, with commas between.")
@click.option("--many", default=500, show_default=True, help="Pictures of the part `memory`.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--part", hidden=True)
@click.option("--scratch", hidden=True, type=click.Path(path_type=Path))
def main(only: str, part: str | None, scratch: Path | None, **options: Any) -> None:
    """Print what each part measured, a JSON object a line."""
    if part is not None and scratch is not None:
        warnings.simplefilter("ignore")
        _RUN[part](Run(scratch=scratch, **options))
        return
    given = [f"--{name}={options[name]}" for name in ("side", "steps", "runs", "device", "many")]
    line = [sys.executable, "-m", "diffoundry.bench.cuda", options["checkpoint"], options["bundle"], *given]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in _RUN if only == "all" else only.split(","):
            done = subprocess.run([*line, "--part", name, "--scratch", folder], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
                print(json.dumps({"what": name, "failed": reason[:300]}), flush=True)
                failed = True
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
