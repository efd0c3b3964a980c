"""`load(bundle)` and the `Pipeline` that turns prompts into images."""

from __future__ import annotations

import contextlib
import difflib
import json
import operator
import re
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..bundle import Bundle, BundleError, RequestError
from ..engines import Array, Engine, EngineStore
from .device_loop import can_link, denoise_on_device
from .guidance import Guidance
from .images import to_image
from .loop import Callback, Denoiser, Row, denoise
from .noise import GENERATORS
from .schedulers import Steps, Table
from .schedules import Schedules
from .tokenizer import PromptTokenizer

_LARGEST_SEED = 2**62
_LARGEST_SIDE = 16384
_MOST_STEPS = 1_000_000
_MOST_IMAGES = 4096
_MOST_THREADS = 1024
_SMALL_BYTES = 64 << 20
"""A model under this has operators too small to be worth sharing among processors."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_FAMILIES = {"stable-diffusion": ("text_encoder", "unet", "vae_decoder")}
"""The families that this runtime runs, and the components that each needs."""
_PRECISIONS = ("fp32", "as exported")
_GUIDANCE = {
    "guidance": "scale",
    "guidance_mode": "mode",
    "guidance_interval": "interval",
    "guidance_rescale": "rescale",
}
_LOOPS = ("host", "device")
_TEXTS = ("prompt", "negative_prompt")


@dataclass(frozen=True, slots=True)
class Request:
    """What to draw. `seed` None means a fresh random one; sizes None mean the checkpoint's own.

    scheduler: a short name or a diffusers class; None is the checkpoint's own. scheduler_options: laid over the
    checkpoint's scheduler configuration. timesteps, sigmas: a schedule of one's own, in place of `steps`.
    rng: whose generator `seed` is for, `cpu` or `cuda`, as in torch.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance: Guidance = field(default_factory=Guidance)
    scheduler: str | None = None
    seed: int | None = None
    count: int = 1
    width: int | None = None
    height: int | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    rng: str = "cpu"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, _MOST_STEPS),
            ("count", 1, _MOST_IMAGES),
            ("seed", 0, _LARGEST_SEED),
            ("width", 1, _LARGEST_SIDE),
            ("height", 1, _LARGEST_SIDE),
        ):
            value = getattr(self, name)
            if value is not None or name in ("steps", "count"):
                object.__setattr__(self, name, whole_number(name, value, low, high))
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, str) or _SURROGATE.search(text):
                found = f"{type(text).__name__}" if not isinstance(text, str) else "bytes that are not UTF-8"
                raise RequestError(f"{name} must be a string of text, found {found}")
        if not isinstance(self.guidance, Guidance):
            object.__setattr__(self, "guidance", Guidance(self.guidance))
        object.__setattr__(self, "scheduler_options", _plain(self.scheduler_options))
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise RequestError(f"unknown scheduler {self.scheduler!r}: give the name of one")
        for name in ("timesteps", "sigmas"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        if self.timesteps is not None and self.sigmas is not None:
            raise RequestError("timesteps and sigmas are two ways to say the same: give one of them")
        if not isinstance(self.rng, str) or self.rng not in GENERATORS:
            raise RequestError(f"unknown rng {self.rng!r}: choose one of {', '.join(GENERATORS)}")
        if self.seed is not None and self.seed + self.count - 1 > _LARGEST_SEED:
            raise RequestError(f"the seed of the last image would be above {_LARGEST_SEED}: choose a smaller seed")
        if not self.guidance.active and (self.guidance.rescale or self.guidance.interval != (0.0, 1.0)):
            raise RequestError(
                "the guidance rescale and interval have no effect without guidance: leave them out, or set it above 1"
            )
        if self.negative_prompt and not self.guidance.active:
            raise RequestError(
                "the negative prompt has no effect without guidance: leave it out, or set guidance above 1"
            )


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int. Raises `RequestError` when it is no whole number from `low` to `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, found {value!r}")
    return number


def _plain(options: Any) -> dict[str, Any]:
    """A copy of `options` as plain JSON values. Raises `RequestError` for what JSON cannot hold."""
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise RequestError(f"scheduler_options must map names to values, found {options!r}")
    try:
        text = json.dumps(dict(options), allow_nan=False, default=lambda value: value.tolist())
        return dict(json.loads(text))
    except (TypeError, ValueError, AttributeError, RecursionError):
        raise RequestError("scheduler_options must hold finite numbers, texts, true, false, null and lists") from None


def _numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """`values` as finite floats. Raises `RequestError` when they are none, or none are given."""
    if values is None:
        return None
    numbers: tuple[float, ...] = ()
    if isinstance(values, (list, tuple, np.ndarray)):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            numbers = tuple(float(value) for value in values if not isinstance(value, (bool, str)))
        numbers = numbers if len(numbers) == len(values) else ()
    if not numbers or not np.isfinite(numbers).all():
        raise RequestError(f"{name} must be a list of numbers, found {values!r}")
    return numbers


@dataclass(frozen=True, slots=True)
class _Job:
    """A request made ready: `texts` are the prompt and, where it is guided, the negative prompt."""

    request: Request
    table: Table
    texts: tuple[str, ...]
    seeds: list[int]
    size: tuple[int, int]
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """Images with what made them: image i came from `seeds[i]` alone.

    cut: the parts of the prompts that did not fit the text encoder's window. seconds: time by stage.
    latents: the final latents, float32 (count, C, H/downscale, W/downscale).
    """

    images: list[Image.Image]
    seeds: list[int]
    request: dict[str, Any]
    cut: dict[str, str]
    seconds: dict[str, float]
    latents: Array


class Pipeline:
    """A loaded bundle. Engines are loaded when first needed and kept; runs may come from several threads."""

    def __init__(
        self, bundle: Bundle, *, provider: str = "cpu", threads: int | None = None, loop: str | None = None
    ) -> None:
        """loop: where the step of the loop runs, `host` or `device` (the `step` graph of the bundle).

        By default it is the host on the CPU, where it is the faster one (`benchmarks/step.py`), and the device
        elsewhere. Raises `BundleError` for a bundle of another kind, `EngineError` when the provider is not there.
        """
        from ..engines.onnxruntime import default_threads, require_provider

        _check_manifest(bundle)
        require_provider(provider)
        if threads is not None:
            threads = whole_number("threads", threads, 1, _MOST_THREADS)
        self.bundle = bundle
        self.provider = provider
        self._threads = threads
        self._store = None if bundle.foreign else EngineStore(bundle.root / "engines")
        self._engines: dict[str, Engine] = {}
        if loop not in (None, *_LOOPS):
            raise RequestError(f"unknown loop {loop!r}: choose one of {', '.join(_LOOPS)}")
        if loop == "device" and "step" not in bundle.manifest.components:
            raise BundleError(f"{bundle.root} holds no step graph: compile it again, or use the loop 'host'")
        on_device = provider != "cpu" and "step" in bundle.manifest.components
        self._loop_asked = loop
        self._loop = loop or ("device" if on_device else "host")
        self._lock = threading.RLock()
        self._workers = (threads or default_threads()) - 1
        self._pool = ThreadPoolExecutor(self._workers, "diffoundry") if self._workers else None
        self._schedules = Schedules(bundle)
        self._tokenizers: dict[str, PromptTokenizer] = {}

    def engine(self, name: str) -> Engine:
        """The engine of component `name`, loaded on first use.

        Raises `BundleError` when its files were changed, `EngineError` when the provider cannot run it.
        """
        from ..engines.onnxruntime import load_component

        with self._lock:
            if name not in self._engines:
                component = self.bundle.component(name)
                self.bundle.check(component.files)
                self._engines[name] = load_component(
                    self.bundle.root,
                    name,
                    component,
                    provider=self.provider,
                    threads=1 if name == "unet" and self._small(name) else self._threads,
                    store=self._store,
                )
            return self._engines[name]

    def _small(self, name: str) -> bool:
        """Whether rows of this component's calls are shared among the processors, rather than its operators."""
        model = self.bundle.path(self.bundle.component(name).model)
        weights = sum(path.stat().st_size for path in model.parent.glob("model.onnx*") if path.is_file())
        return self.provider == "cpu" and weights < _SMALL_BYTES

    def release(self, name: str) -> None:
        """Drop the engine of component `name` and its memory; the next use loads it again."""
        with self._lock:
            self._engines.pop(name, None)

    def encode(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """Text embeddings, (len(prompts), tokens, width), in one call, and what was cut off each prompt."""
        with self._lock:
            if "text_encoder" not in self._tokenizers:
                prompt = self.bundle.manifest.prompts["text_encoder"]
                self._tokenizers["text_encoder"] = PromptTokenizer(self.bundle.path(prompt.tokenizer), prompt)
            tokenizer = self._tokenizers["text_encoder"]
        ids, cut = tokenizer.encode(prompts)
        engine = self.engine("text_encoder")
        spec = engine.inputs[0]
        output = engine({spec.name: ids.astype(spec.dtype)})
        name = "last_hidden_state" if "last_hidden_state" in output else engine.outputs[0].name
        return output[name], cut

    def decode(self, latents: Array) -> Array:
        """Pixels in [-1, 1], float (N, 3, H, W), of latents (N, C, H/downscale, W/downscale); one image at a time."""
        settings = self.bundle.manifest.latents
        engine = self.engine("vae_decoder")
        spec = engine.inputs[0]
        scaled = latents / np.float32(settings.scaling_factor) + np.float32(settings.shift_factor)
        rows = [
            engine({spec.name: scaled[i : i + 1].astype(spec.dtype)})[engine.outputs[0].name]
            for i in range(len(scaled))
        ]
        return np.concatenate(rows)

    def generate(
        self, request: Request, *, batch: int | None = None, low_memory: bool = False, callback: Callback | None = None
    ) -> Result:
        """Run `request`; see `generate_many` for the options and errors."""
        return self.generate_many([request], batch=batch, low_memory=low_memory, callback=callback)[0]

    def generate_many(
        self,
        requests: Sequence[Request],
        *,
        batch: int | None = None,
        low_memory: bool = False,
        callback: Callback | None = None,
    ) -> list[Result]:
        """Run several requests in one batch: all but their size may differ, and each image is what it is alone.

        batch: images in one U-Net call (default: all). low_memory: drop each engine when its part is done.
        callback: see `loop.Callback`; it counts the steps of all batches, each as long as its longest row.
        Raises `RequestError` for what the bundle cannot do, before anything is run.
        """
        if not isinstance(requests, Sequence) or not all(isinstance(request, Request) for request in requests):
            raise RequestError("generate_many takes a list of Request")
        jobs = [self._job(request) for request in requests]
        total = sum(job.request.count for job in jobs)
        if not jobs or total > _MOST_IMAGES:
            raise RequestError(f"a batch must have from 1 to {_MOST_IMAGES} images, found {total}")
        if len({job.size for job in jobs}) > 1:
            raise RequestError("the requests of one batch must have one size: run other sizes on their own")
        batch = total if batch is None else whole_number("batch", batch, 1, _MOST_IMAGES)
        if callback is not None and not callable(callback):
            raise RequestError(f"callback must be callable, found {type(callback).__name__}")
        seconds: dict[str, float] = {}
        with _timed(seconds, "text_encoder"):
            texts = list(dict.fromkeys(text for job in jobs for text in job.texts))
            embeddings, cut = self.encode(texts)
        if low_memory:
            self.release("text_encoder")
        with _timed(seconds, "load"):
            unet = self.engine("unet")
        with _timed(seconds, "loop"):
            rows = [row for job in jobs for row in self._rows(job, texts, embeddings)]
            batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            lengths = [max(row.table.steps for row in part) for part in batches]
            finished = []
            for i, part in enumerate(batches):
                report = _shifted(callback, sum(lengths[:i]), sum(lengths))
                finished.append(self._denoise(unet, part, report))
        del unet  # it holds the session, and low_memory is to free it
        if low_memory:
            self.release("unet")
        latents = np.concatenate(finished)
        with _timed(seconds, "vae_decoder"):
            images = [to_image(sample) for sample in self.decode(latents)]
        results, at = [], 0
        for job in jobs:
            own = slice(at, at + job.request.count)
            at = own.stop
            cuts = {name: cut[texts.index(text)] for name, text in zip(_TEXTS, job.texts, strict=False)}
            results.append(
                Result(
                    images=images[own],
                    seeds=job.seeds,
                    request=job.record,
                    cut={name: text for name, text in cuts.items() if text},
                    seconds=seconds,
                    latents=latents[own],
                )
            )
        return results

    def _denoise(self, unet: Engine, rows: list[Row], callback: Callback | None) -> Array:
        split = any(row.guidance.active and row.guidance.mode == "split" for row in rows)
        if self._loop_asked == "device" and (split or not can_link(unet)):
            raise RequestError("the loop on the device takes joint guidance and float32 latents: use the loop 'host'")
        if self._loop == "device" and not split and can_link(unet):
            return denoise_on_device(unet, self.engine("step"), rows, callback)
        pool, workers = (self._pool, self._workers) if self._small("unet") else (None, 0)
        return denoise(Denoiser(unet, rows, pool, workers), rows, callback)

    def _job(self, request: Request) -> _Job:
        width, height = self._size(request)
        asked = Steps(request.steps, timesteps=request.timesteps, sigmas=request.sigmas)
        table = self._schedules.table(asked, request.scheduler, request.scheduler_options)
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        record = {
            **{item.name: getattr(request, item.name) for item in fields(request)},
            "guidance": asdict(request.guidance),
            "scheduler_options": dict(request.scheduler_options),
            "scheduler": self._schedules.named(request.scheduler),
            "steps": request.steps if request.timesteps is None and request.sigmas is None else table.steps,
            "seed": first,
            "width": width,
            "height": height,
        }
        texts = (request.prompt, request.negative_prompt) if request.guidance.active else (request.prompt,)
        return _Job(request, table, texts, [first + i for i in range(request.count)], (width, height), record)

    def _rows(self, job: _Job, texts: list[str], embeddings: Array) -> list[Row]:
        settings = self.bundle.manifest.latents
        width, height = (side // settings.downscale for side in job.size)
        prompt, *negative = (embeddings[texts.index(text)] for text in job.texts)
        rows = []
        for seed in job.seeds:
            generator = GENERATORS[job.request.rng](seed)
            latents = generator.randn(settings.channels, height, width) * np.float32(job.table.init_scale)
            guided = negative[0] if negative else None
            rows.append(Row(job.table, job.request.guidance, generator, prompt, guided, latents))
        return rows

    def __call__(self, prompt: str, **options: Any) -> Result:
        """`generate` with plain keywords.

        They are those of `Request` (guidance as a number), `guidance_mode`, `guidance_interval`, `guidance_rescale`,
        and those of `generate`: `batch`, `low_memory`, `callback`.
        """
        run = {key: options.pop(key) for key in ("batch", "low_memory", "callback") if key in options}
        guidance = {field_name: options.pop(key) for key, field_name in _GUIDANCE.items() if key in options}
        if isinstance(guidance.get("scale"), Guidance):
            if len(guidance) > 1:
                raise RequestError("give the guidance as one Guidance, or as numbers")
            options["guidance"] = guidance.pop("scale")
        else:
            options["guidance"] = Guidance(**guidance)
        known = set(Request.__dataclass_fields__) - {"prompt"}
        unknown = set(options) - known
        if unknown:
            name = sorted(unknown)[0]
            near = difflib.get_close_matches(name, [*known, *_GUIDANCE, "batch", "low_memory", "callback"], n=1)
            raise RequestError(f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        return self.generate(Request(prompt, **options), **run)

    def _size(self, request: Request) -> tuple[int, int]:
        manifest = self.bundle.manifest
        width = request.width if request.width is not None else manifest.default_width
        height = request.height if request.height is not None else manifest.default_height
        unit = manifest.latents.downscale
        for name, value in (("width", width), ("height", height)):
            if value < unit or value % unit:
                near = max(unit, round(value / unit) * unit)
                raise RequestError(
                    f"{name} must be a multiple of {unit} from {unit} to {_LARGEST_SIDE}, found {value}: try {near}"
                )
        return width, height


def load(bundle: str | Path, *, provider: str = "cpu", threads: int | None = None, loop: str | None = None) -> Pipeline:
    """Open a bundle, or a folder that `optimum-cli export onnx` wrote, for running.

    provider: cpu, cuda or tensorrt (ONNX Runtime's execution providers). threads: of the CPU, default all.
    loop: see `Pipeline`. Raises `BundleError` when the folder is no bundle.
    """
    if not isinstance(bundle, (str, Path)):
        raise BundleError(f"the bundle must be a path, found {bundle!r}")
    return Pipeline(Bundle.open(bundle), provider=provider, threads=threads, loop=loop)


class _timed:
    """Adds the seconds of its block to `seconds[name]`."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + time.perf_counter() - self._start


def _check_manifest(bundle: Bundle) -> None:
    """Raise `BundleError` for what this runtime cannot run, or would run without a hash to hold it against."""
    manifest, root = bundle.manifest, bundle.root
    needed = _FAMILIES.get(manifest.family)
    if needed is None:
        raise BundleError(f"{root} is of the family {manifest.family!r}; this version runs {', '.join(_FAMILIES)}")
    if manifest.precision not in _PRECISIONS:
        raise BundleError(f"{root} has precision {manifest.precision!r}; this version runs {_PRECISIONS[0]}")
    if "txt2img" not in manifest.tasks:
        raise BundleError(f"{root} does not hold the task txt2img, only {', '.join(manifest.tasks) or 'none'}")
    for name in needed:
        bundle.component(name)
    if "text_encoder" not in manifest.prompts:
        raise BundleError(f"{root}: field 'prompts.text_encoder' is missing; compile the bundle again")
    if not bundle.foreign:
        tokenizer = f"{manifest.prompts['text_encoder'].tokenizer}/"
        small = ["scheduler/scheduler_config.json", *(f for f in manifest.files if f.startswith(tokenizer))]
        unlisted = [name for name in (small[0], f"{tokenizer}tokenizer.json") if name not in manifest.files]
        if unlisted:
            raise BundleError(f"{root}: the manifest has no hash for {', '.join(unlisted)}; compile the bundle again")
        bundle.check(small)


def _shifted(callback: Callback | None, done: int, total: int) -> Callback | None:
    if callback is None:
        return None
    return lambda k, _, latents: callback(done + k, total, latents)
