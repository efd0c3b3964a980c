"""`load(bundle)` and the `Pipeline` that turns prompts into images."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from ..bundle import AS_EXPORTED, PRECISIONS, Bundle
from ..bundle.wiring import SOURCES, TASKS
from ..common.arrays import Array
from ..common.checks import MOST_IMAGES, MOST_THREADS, whole_number
from ..common.errors import BundleError, EngineError, RequestError
from ..engines import Engine
from ..engines.loader import EngineLoader
from ..families import open_bundle
from . import tasks
from .autoencoder import Autoencoder, decoder_of
from .device_loop import DeviceLoop, can_link
from .guidance import Guidance
from .images import to_image
from .inputs import Inputs, Told, cuts
from .jobs import Job, Jobs, check_decoder
from .loop import Callback, Denoiser, Row, denoise
from .names import ours
from .noise import GENERATORS
from .request import Request
from .text import Embedding, TextEncoders

_SMALL_BYTES = 64 << 20
"""A model under this has operators too small to be worth sharing among processors."""
_GUIDANCE = {
    "guidance": "scale",
    "guidance_mode": "mode",
    "guidance_interval": "interval",
    "guidance_rescale": "rescale",
}
_LOOPS = ("host", "device")
_RUN = ("batch", "low_memory", "callback")
_OPTIONS = tuple(name for name in Request.__dataclass_fields__ if name != "prompt")


@dataclass(frozen=True, slots=True)
class Result:
    """Images with what made them: image i came from `seeds[i]` alone. There are none where latents were asked for.

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
    """A loaded bundle. Engines are loaded when first needed and kept; runs may come from several threads.

    In a process that is forked later it loads its engines again on the CPU; on a GPU its methods raise `EngineError`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        engine: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        loop: str | None = None,
        weight_budget: int | None = None,
        engines: Mapping[str, Callable[[], Engine]] | None = None,
    ) -> None:
        """engine: one of `engines.names.ENGINES`; the default is what the bundle was compiled for.

        precision: of the models; the default is what the bundle was compiled for, but fp32, the fastest, on the CPU.
        loop: where the step of the loop runs, `host` or `device` (the `step` graph of the bundle). By default it is
        the host on the CPU, where it is the faster one (`benchmarks/step.py`), and the device elsewhere.
        weight_budget: bytes of weights that a plan built with weight streaming keeps on the GPU.
        engines: what loads a component, by its name, in place of the bundle's own engines.
        Raises `BundleError` for a bundle of another kind, `EngineError` when the engine is not there.
        """
        from ..engines.onnxruntime import default_threads

        _check_manifest(bundle)
        if threads is not None:
            threads = whole_number("threads", threads, 1, MOST_THREADS)
        self.bundle = bundle
        self._loader = EngineLoader(bundle, engine, precision, weight_budget)
        self._threads = threads
        self._engines_given = dict(engines or {})
        if loop not in (None, *_LOOPS):
            raise RequestError(f"unknown loop {loop!r}: choose one of {', '.join(_LOOPS)}")
        self._denoiser, self._step = (bundle.manifest.named(role) for role in ("denoiser", "step"))
        if loop == "device" and not self._step:
            raise BundleError(f"{bundle.root} holds no step graph: compile it again, or use the loop 'host'")
        on_device = not self._loader.engine.on_cpu and bool(self._step)
        self._loop_asked = loop
        self._loop = loop or ("device" if on_device else "host")
        self._workers = (threads or default_threads()) - 1
        self._process = os.getpid()
        self._start()
        _PIPELINES.add(self)
        self._inputs = Inputs(bundle, TextEncoders(bundle, self.engine))
        self._jobs = Jobs(bundle, self._inputs)
        self._autoencoder = Autoencoder(bundle, self.engine)

    def engine(self, name: str) -> Engine:
        """The engine of component `name`, loaded on first use.

        Raises `BundleError` when its files were changed, `EngineError` when it cannot be loaded.
        """
        self._check_process()
        with self._lock:
            if name not in self._engines:
                threads = 1 if name == self._denoiser and self._small(name) else self._threads
                loader = self._engines_given.get(name)
                self._engines[name] = self._loader.load(name, threads) if loader is None else loader()
            return self._engines[name]

    def info(self) -> dict[str, Any]:
        """What runs the bundle: `engine`, `precision`, and the plan that served each component, where it has plans."""
        self._check_process()
        return self._loader.info()

    def _start(self) -> None:
        """Hold no engines, and locks and threads of this process."""
        self._lock = threading.RLock()
        self._engines: dict[str, Engine] = {}
        self._device_loop = DeviceLoop()
        self._pool = ThreadPoolExecutor(self._workers, "diffoundry") if self._workers else None

    def _start_in_child(self) -> None:
        """Start again in a forked process, where the threads of the engines are not there."""
        if self._loader.engine.on_cpu:
            self._inherited = self._engines, self._device_loop, self._pool  # to end them would wait for their threads
            self._process = os.getpid()
            self._start()

    def _check_process(self) -> None:
        """Raise `EngineError` where a GPU was opened before this process was forked: it cannot be used in both."""
        if os.getpid() != self._process:
            raise EngineError("this pipeline was loaded in another process, before a fork: load the bundle in this one")

    def __reduce__(self) -> NoReturn:
        """Pickling and copying. Raises `EngineError`: engines belong to the process that loaded them."""
        raise EngineError("a pipeline cannot be copied or sent to another process: load the bundle there")

    def _small(self, name: str) -> bool:
        """Whether rows of this component's calls are shared among the processors, rather than its operators."""
        folder = self.bundle.path(name)
        weights = sum(path.stat().st_size for path in folder.glob("model.onnx*") if path.is_file())
        return self._loader.engine.on_cpu and weights < _SMALL_BYTES

    def release(self, name: str) -> None:
        """Drop the engine of component `name` and its memory; the next use loads it again."""
        self._check_process()
        with self._lock:
            self._engines.pop(name, None)
            if name in (self._denoiser, self._step):
                self._device_loop.clear()  # it is linked to them

    def release_all(self) -> None:
        """Drop every engine and its memory."""
        self._check_process()
        with self._lock:
            self._engines.clear()
            self._device_loop.clear()

    def encode(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """Text embeddings, (len(prompts), tokens, width), and what was cut off each prompt."""
        self._check_process()
        return self._inputs.embeddings(prompts)

    def decode(self, latents: Array, decoder: str = "full", *, tiled: bool = False) -> Array:
        """Pixels in [-1, 1], float (N, 3, H, W), of latents (N, C, H/downscale, W/downscale); one image at a time."""
        check_decoder(self.bundle, decoder)
        return self._autoencoder.decode(latents, decoder, tiled=tiled)

    def preview(self, latents: Array) -> list[Image.Image]:
        """Pictures of latents on their way, by the tiny decoder. Raises `RequestError` when the bundle has none."""
        return [to_image(sample) for sample in self.decode(np.nan_to_num(latents), "tiny")]

    def check(self, request: Request) -> tuple[int, int]:
        """The width and height that `request` makes. Raises `RequestError` for what the bundle cannot do."""
        return self._jobs.make(request).size

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

        batch: the most images in one U-Net call (default: all, or as many as its plans take).
        low_memory: drop each engine when its part is done.
        callback: see `loop.Callback`; it counts the steps of all batches, each as long as its longest row.
        Raises `RequestError` for what the bundle cannot do, before anything is run.
        """
        self._check_process()
        if not isinstance(requests, Sequence) or not all(isinstance(request, Request) for request in requests):
            raise RequestError("generate_many takes a list of Request")
        jobs = [self._jobs.make(request) for request in requests]
        total = sum(job.request.count for job in jobs)
        if not jobs or total > MOST_IMAGES:
            raise RequestError(f"a batch must have from 1 to {MOST_IMAGES} images, found {total}")
        if len({job.size for job in jobs}) > 1:
            raise RequestError("the requests of one batch must have one size: run other sizes on their own")
        batch = total if batch is None else whole_number("batch", batch, 1, MOST_IMAGES)
        if callback is not None and not callable(callback):
            raise RequestError(f"callback must be callable, found {type(callback).__name__}")
        seconds: dict[str, float] = {}
        with _timed(seconds, "text_encoder"):
            told = self._inputs.tell([job.request for job in jobs], [job.guidance.active for job in jobs])
        if low_memory:
            for name in self._inputs.encoders:
                self.release(name)
        encoded = [self._encode_picture(job, seconds) for job in jobs]
        if low_memory:
            self.release(self.bundle.manifest.named("encoder"))
        with _timed(seconds, "load"):
            unet = self.engine(self._denoiser)
        with _timed(seconds, "loop"):
            parts = zip(jobs, told, encoded, strict=True)
            rows = [row for job, texts, made in parts for row in self._rows(job, texts, made)]
            batch = min(batch, self._most_images(jobs))
            batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
            lengths = [max(row.table.steps for row in part) for part in batches]
            finished = []
            for i, part in enumerate(batches):
                report = _shifted(callback, sum(lengths[:i]), sum(lengths))
                finished.append(self._denoise(unet, part, report))
        del unet  # it holds the session, and low_memory is to free it
        if low_memory:
            self.release(self._denoiser)
        latents = np.concatenate(finished)
        results, at = [], 0
        for job, texts in zip(jobs, told, strict=True):
            own = slice(at, at + job.request.count)
            at = own.stop
            results.append(
                Result(
                    images=self._finish(job, latents[own], seconds),
                    seeds=job.seeds,
                    request=job.record,
                    cut=cuts(texts),
                    seconds=seconds,
                    latents=latents[own],
                )
            )
        return results

    def _most_images(self, jobs: Sequence[Job]) -> int:
        """The most images that one call of the U-Net takes."""
        width, height = (side // self.bundle.manifest.latents.downscale for side in jobs[0].size)
        rows = self._loader.most_rows(height, width)
        joint = any(job.guidance.active and job.guidance.mode == "joint" for job in jobs)
        return MOST_IMAGES if rows is None else max(1, rows // (2 if joint else 1))

    def _finish(self, job: Job, latents: Array, seconds: dict[str, float]) -> list[Image.Image]:
        request = job.request
        if request.output == "latent":
            return []
        with _timed(seconds, decoder_of(self.bundle.manifest, request.decoder)):
            pixels = self._autoencoder.decode(latents, request.decoder, tiled=request.tiled)
            images = [to_image(sample) for sample in pixels]
        return images if job.picture is None else [job.picture.finish(image) for image in images]

    def _denoise(self, unet: Engine, rows: list[Row], callback: Callback | None) -> Array:
        linked = self._loop == "device" and can_link(unet, rows)
        if self._loop_asked == "device" and not linked:
            raise RequestError(
                "the loop on the device takes joint guidance and float32 latents, and does not inpaint: "
                "use the loop 'host'"
            )
        if linked:
            return self._device_loop(unet, self.engine(self._step), rows, callback)
        pool, workers = (self._pool, self._workers) if self._small(self._denoiser) else (None, 0)
        return denoise(Denoiser(unet, rows, pool, workers), rows, callback)

    def _encode_picture(self, job: Job, seconds: dict[str, float]) -> tasks.Encoded | None:
        if job.picture is None:
            return None
        with _timed(seconds, self.bundle.manifest.named("encoder")):
            return tasks.encode(
                job.request,
                job.picture,
                self._autoencoder,
                inpaints=self._inputs.inpaints,
                downscale=self.bundle.manifest.latents.downscale,
            )

    def _rows(self, job: Job, texts: Told, encoded: tasks.Encoded | None) -> list[Row]:
        settings = self.bundle.manifest.latents
        width, height = (side // settings.downscale for side in job.size)

        def told(text: Embedding, negative: bool) -> dict[str, Array]:
            return self._inputs.conditions(job.request, job.size, text, embedded=job.embedded, negative=negative)

        prompt = told(texts[0], False)
        negative = None if texts[1] is None else told(texts[1], True)
        rows = []
        for i, seed in enumerate(job.seeds):
            generator = GENERATORS[job.request.rng](seed)
            start = tasks.start(
                job.request,
                job.table,
                encoded,
                np.asarray(job.request.image[i], np.float32) if job.request.starts_from_latents else None,
                self._autoencoder,
                generator,
                (settings.channels, height, width),
                inpaints=self._inputs.inpaints,
            )
            rows.append(
                Row(job.table, job.guidance, generator, prompt, negative, start.latents, start.kept, start.channels)
            )
        return rows

    def __call__(self, prompt: str = "", **options: Any) -> Result:
        """`generate` with plain keywords.

        They are those of `Request` (guidance as a number), `guidance_mode`, `guidance_interval`, `guidance_rescale`,
        and those of `generate`: `batch`, `low_memory`, `callback`. Raises `RequestError` for others.
        """
        options = ours(options, (*_OPTIONS, *_GUIDANCE, *_RUN))
        run = {key: options.pop(key) for key in _RUN if key in options}
        guidance = {field_name: options.pop(key) for key, field_name in _GUIDANCE.items() if key in options}
        if isinstance(guidance.get("scale"), Guidance):
            if len(guidance) > 1:
                raise RequestError("give the guidance as one Guidance, or as numbers")
            options["guidance"] = guidance.pop("scale")
        else:
            options["guidance"] = Guidance(**guidance)
        return self.generate(Request(prompt, **options), **run)


_PIPELINES: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def _start_in_child() -> None:
    for pipeline in list(_PIPELINES):
        pipeline._start_in_child()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_start_in_child)


def load(
    bundle: str | Path,
    *,
    engine: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    loop: str | None = None,
    weight_budget: int | None = None,
) -> Pipeline:
    """Open a bundle, or a folder that `optimum-cli export onnx` wrote, for running.

    engine, precision, loop, weight_budget: see `Pipeline`. threads: of the CPU, default all.
    Raises `BundleError` when the folder is no bundle, `EngineError` when the engine is not to be had here.
    """
    if not isinstance(bundle, (str, Path)):
        raise BundleError(f"the bundle must be a path, found {bundle!r}")
    return Pipeline(
        open_bundle(bundle), engine=engine, precision=precision, threads=threads, loop=loop, weight_budget=weight_budget
    )


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
    unknown = sorted(set(manifest.wiring.inputs.values()) - set(SOURCES))
    if unknown:
        raise BundleError(
            f"{root}: the {manifest.family} denoiser reads {', '.join(unknown)}; this version knows "
            f"{', '.join(SOURCES)}: upgrade diffoundry"
        )
    if manifest.precision not in (*PRECISIONS, AS_EXPORTED):
        raise BundleError(f"{root} has precision {manifest.precision!r}; this version runs {', '.join(PRECISIONS)}")
    known = [task for task in manifest.tasks if task in TASKS]
    if not known:
        raise BundleError(
            f"{root} holds the tasks {', '.join(manifest.tasks) or '(none)'}; this version runs {', '.join(TASKS)}"
        )
    for role in ("denoiser", *dict.fromkeys(role for task in known for role in TASKS[task])):
        if not manifest.with_role(role):
            raise BundleError(f"{root} has no {role} among its components: compile it again")
    if not manifest.wiring.text:
        raise BundleError(f"{root}: field 'wiring.text' is empty; compile the bundle again")
    inputs = {tensor.name for tensor in bundle.component(manifest.named("denoiser")).inputs}
    if inputs != set(manifest.wiring.inputs):
        wrong = ", ".join(sorted(inputs ^ set(manifest.wiring.inputs)))
        raise BundleError(
            f"{root}: wiring and inputs of the denoiser do not agree on {wrong}; compile the bundle again"
        )
    if not bundle.foreign:
        folders = tuple(f"{folder}/" for folder in manifest.tokenizers)
        small = ["scheduler/scheduler_config.json", *(f for f in manifest.files if f.startswith(folders))]
        needed = [small[0], *(f"{folder}tokenizer.json" for folder in folders)]
        unlisted = [name for name in needed if name not in manifest.files]
        if unlisted:
            raise BundleError(f"{root}: the manifest has no hash for {', '.join(unlisted)}; compile the bundle again")
        bundle.check(small)


def _shifted(callback: Callback | None, done: int, total: int) -> Callback | None:
    if callback is None:
        return None
    return lambda k, _, latents: callback(done + k, total, latents)
