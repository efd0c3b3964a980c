"""`load(bundle)` and the `Pipeline` that turns prompts into images."""

from __future__ import annotations

import difflib
import hashlib
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..bundle import Bundle, BundleError, RequestError
from ..engines import Array, Engine, EngineStore
from . import tasks
from .autoencoder import DECODERS, Autoencoder
from .conditioning import Conditioning, guidance_embedding
from .device_loop import can_link, denoise_on_device
from .guidance import Guidance
from .images import to_image
from .loop import Callback, Denoiser, Row, denoise
from .noise import GENERATORS
from .request import LARGEST_SIDE, MOST_IMAGES, Request, whole_number
from .schedulers import Steps, Table
from .schedules import Schedules
from .text import Ask, Embedding, TextEncoders

_MOST_THREADS = 1024
_SMALL_BYTES = 64 << 20
"""A model under this has operators too small to be worth sharing among processors."""
_FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "latent-consistency")
"""The families that this runtime runs."""
_TASKS = {
    "txt2img": ("vae_decoder",),
    "img2img": ("vae_encoder", "vae_decoder"),
    "inpaint": ("vae_encoder", "vae_decoder"),
}
"""What each task needs beside text encoders and U-Net."""
_PRECISIONS = ("fp32", "as exported")
_GUIDANCE = {
    "guidance": "scale",
    "guidance_mode": "mode",
    "guidance_interval": "interval",
    "guidance_rescale": "rescale",
}
_LOOPS = ("host", "device")
_RUN = ("batch", "low_memory", "callback")
_SCORED = "requires_aesthetics_score"
_RECORDED = ("prompt", "negative_prompt", "seed", "count", "timesteps", "sigmas", "rng")
"""What a record always says; of the rest it says what is not the default."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A request made ready. guidance: as the loop applies it; embedded: as the U-Net is told it, where it is."""

    request: Request
    table: Table
    guidance: Guidance
    embedded: float | None
    picture: tasks.Picture | None
    seeds: list[int]
    size: tuple[int, int]
    record: dict[str, Any]


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
        self._text = TextEncoders(bundle, self.engine)
        self._autoencoder = Autoencoder(bundle, self.engine)
        self._widths = {part.name: part.shape[-1] for part in bundle.component("unet").inputs if part.shape}
        sample = [part.shape[1] for part in bundle.component("unet").inputs if part.name == "sample"]
        self._inpaints = sample == [2 * bundle.manifest.latents.channels + 1]

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

    def release_all(self) -> None:
        """Drop every engine and its memory."""
        with self._lock:
            self._engines.clear()

    def encode(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """Text embeddings, (len(prompts), tokens, width), and what was cut off each prompt."""
        made = self._text.embed([Ask((prompt, prompt)) for prompt in prompts])
        return np.stack([each.hidden for each in made]), [max(each.cut, key=len) for each in made]

    def decode(self, latents: Array, decoder: str = "full", *, tiled: bool = False) -> Array:
        """Pixels in [-1, 1], float (N, 3, H, W), of latents (N, C, H/downscale, W/downscale); one image at a time."""
        self._check_decoder(decoder)
        return self._autoencoder.decode(latents, decoder, tiled=tiled)

    def preview(self, latents: Array) -> list[Image.Image]:
        """Pictures of latents on their way, by the tiny decoder. Raises `RequestError` when the bundle has none."""
        return [to_image(sample) for sample in self.decode(np.nan_to_num(latents), "tiny")]

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
        if not jobs or total > MOST_IMAGES:
            raise RequestError(f"a batch must have from 1 to {MOST_IMAGES} images, found {total}")
        if len({job.size for job in jobs}) > 1:
            raise RequestError("the requests of one batch must have one size: run other sizes on their own")
        batch = total if batch is None else whole_number("batch", batch, 1, MOST_IMAGES)
        if callback is not None and not callable(callback):
            raise RequestError(f"callback must be callable, found {type(callback).__name__}")
        seconds: dict[str, float] = {}
        with _timed(seconds, "text_encoder"):
            told = self._tell(jobs)
        if low_memory:
            for name in self._text.names:
                self.release(name)
        encoded = [self._encode_picture(job, seconds) for job in jobs]
        if low_memory:
            self.release("vae_encoder")
        with _timed(seconds, "load"):
            unet = self.engine("unet")
        with _timed(seconds, "loop"):
            parts = zip(jobs, told, encoded, strict=True)
            rows = [row for job, texts, made in parts for row in self._rows(job, texts, made)]
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
        results, at = [], 0
        for job, texts in zip(jobs, told, strict=True):
            own = slice(at, at + job.request.count)
            at = own.stop
            results.append(
                Result(
                    images=self._finish(job, latents[own], seconds),
                    seeds=job.seeds,
                    request=job.record,
                    cut=_cuts(texts),
                    seconds=seconds,
                    latents=latents[own],
                )
            )
        return results

    def _finish(self, job: _Job, latents: Array, seconds: dict[str, float]) -> list[Image.Image]:
        request = job.request
        if request.output == "latent":
            return []
        with _timed(seconds, DECODERS[request.decoder]):
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
            return denoise_on_device(unet, self.engine("step"), rows, callback)
        pool, workers = (self._pool, self._workers) if self._small("unet") else (None, 0)
        return denoise(Denoiser(unet, rows, pool, workers), rows, callback)

    def _job(self, request: Request) -> _Job:
        """Hold `request` against the bundle, before anything is run."""
        self._check_task(request)
        self._check_decoder(request.decoder)
        self._check_text(request)
        image, mask = tasks.open_originals(request)
        size = self._size(request, image)
        guidance, embedded = self._guidance(request)
        table, steps = self._table(request)
        first = secrets.randbelow(2**32) if request.seed is None else request.seed
        record = {
            **_record(request),
            "guidance": {**asdict(request.guidance), "scale": guidance.scale},
            "scheduler_options": dict(request.scheduler_options),
            "scheduler": self._schedules.named(request.scheduler),
            "steps": steps,
            "seed": first,
            **({} if request.starts_from_latents else {"width": size[0], "height": size[1]}),
        }
        picture = None if request.image is None else tasks.bring_to_size(request, image, mask, size)
        seeds = [first + i for i in range(request.count)]
        return _Job(request, table, guidance, embedded, picture, seeds, size, record)

    def _guidance(self, request: Request) -> tuple[Guidance, float | None]:
        """The guidance that the loop applies, and the scale that the U-Net is told in its place."""
        guidance = request.guidance.or_default(self.bundle.manifest.default_guidance)
        if "timestep_cond" in self._widths:
            if guidance.rescale or guidance.interval != (0.0, 1.0) or request.says_negative:
                raise RequestError(
                    "this model is told the guidance and predicts once: a negative prompt, a rescale and an interval "
                    "have no effect, leave them out"
                )
            return replace(guidance, mode="off"), guidance.scale
        if request.says_negative and not guidance.active:
            raise RequestError(
                "the negative prompt has no effect without guidance: leave it out, or set guidance above 1"
            )
        return guidance, None

    def _check_task(self, request: Request) -> None:
        root, known = self.bundle.root, self.bundle.manifest.tasks
        if request.task in known:
            return
        if self._inpaints:
            raise RequestError(f"{root} is an inpainting model: give an image and a mask")
        if request.task == "txt2img" and "img2img" in known and self.bundle.manifest.options.get(_SCORED):
            raise RequestError(f"{root} refines images: give one, or the latents of the model that it refines")
        raise RequestError(
            f"{root} does not hold the task {request.task}, only {', '.join(known)}: "
            f"compile the checkpoint again with --tasks {','.join((*known, request.task))}"
        )

    def _check_decoder(self, decoder: str) -> None:
        if DECODERS.get(decoder) not in self.bundle.manifest.components:
            raise RequestError(
                f"{self.bundle.root} has no {decoder} decoder: compile the checkpoint again with "
                "--component vae_tiny=FOLDER, the folder of an AutoencoderTiny"
            )

    def _check_text(self, request: Request) -> None:
        second = request.prompt_2 is not None or request.negative_prompt_2 is not None
        if second and len(self._text.names) < 2:
            raise RequestError("this model has one text encoder: leave prompt_2 and negative_prompt_2 out")
        self._text.check(_ask(request))
        plain = request.conditioning == Conditioning() and request.negative_conditioning is None
        if not plain and "time_ids" not in self._widths:
            raise RequestError("this model is told no sizes: leave the conditioning out")
        given = request.negative_conditioning
        scored = self.bundle.manifest.options.get(_SCORED, False)
        if given is not None and given.crop is not None and request.task != "txt2img" and not scored:
            raise RequestError("from an image, the negative is told the crop of the prompt: leave its own out")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            if getattr(request, name) is not None and (getattr(request, pooled) is None) == self._text.pooled:
                raise RequestError(f"this model {'needs' if self._text.pooled else 'takes no'} {pooled} beside {name}")

    def _table(self, request: Request) -> tuple[Table, int]:
        """The calls that a request makes, and the steps of the whole schedule."""
        manifest = self.bundle.manifest
        count = manifest.default_steps if request.steps is None else request.steps
        asked = Steps(count, timesteps=request.timesteps, sigmas=request.sigmas)

        def make(steps: Steps) -> Table:
            return self._schedules.table(steps, request.scheduler, request.scheduler_options)

        if request.timesteps is not None or request.sigmas is not None:
            asked = replace(asked, count=make(asked).steps)
        consistency = manifest.family == "latent-consistency" and self._schedules.is_consistency(request.scheduler)
        table = tasks.schedule(request, asked, make, self._schedules.train_steps, by_strength=consistency)
        return table, asked.count

    def _tell(self, jobs: Sequence[_Job]) -> list[tuple[Embedding, Embedding | None]]:
        """Each prompt and, where it is guided, its negative prompt, as the text encoders give them."""
        zeros = self.bundle.manifest.options.get("force_zeros_for_empty_prompt", False)
        asks = list(dict.fromkeys(ask for job in jobs for ask in _asks(job, zeros) if ask is not None))
        made: dict[Ask | None, Embedding] = dict(zip(asks, self._text.embed(asks), strict=True)) if asks else {}
        told = []
        for job in jobs:
            request = job.request
            ask, negative_ask = _asks(job, zeros)
            prompt = _given(request.prompt_embeds, request.pooled_prompt_embeds) or made[ask]
            negative = None
            if job.guidance.active:
                negative = _given(request.negative_prompt_embeds, request.negative_pooled_prompt_embeds)
                negative = negative or (prompt.zeros() if negative_ask is None else made[negative_ask])
                if request.windows:
                    prompt, negative = self._text.level([prompt, negative])
            told.append((prompt, negative))
        lengths = sorted({len(text.hidden) for pair in told for text in pair if text is not None})
        if len(lengths) > 1:
            raise RequestError(
                f"the prompts and negative prompts of a batch must take as many tokens, found {lengths}: "
                "give embeddings of one length, and run longer prompts on their own"
            )
        return told

    def _conditions(self, job: _Job, text: Embedding, negative: bool) -> dict[str, Array]:
        """The U-Net's inputs beside sample and timestep."""
        inputs = {"encoder_hidden_states": text.hidden}
        if text.pooled is not None:
            inputs["text_embeds"] = text.pooled
        if "time_ids" in self._widths:
            request, scored = job.request, self.bundle.manifest.options.get(_SCORED, False)
            told = request.conditioning
            if negative:
                from_image = request.task != "txt2img"
                told = told.negative(request.negative_conditioning, scored=scored, from_image=from_image)
            inputs["time_ids"] = told.time_ids(job.size[1], job.size[0], scored=scored)
        if job.embedded is not None:
            inputs["timestep_cond"] = guidance_embedding(job.embedded, int(self._widths["timestep_cond"]))
        return inputs

    def _encode_picture(self, job: _Job, seconds: dict[str, float]) -> tasks.Encoded | None:
        if job.picture is None:
            return None
        with _timed(seconds, "vae_encoder"):
            return tasks.encode(
                job.request,
                job.picture,
                self._autoencoder,
                inpaints=self._inpaints,
                downscale=self.bundle.manifest.latents.downscale,
            )

    def _rows(self, job: _Job, texts: tuple[Embedding, Embedding | None], encoded: tasks.Encoded | None) -> list[Row]:
        settings = self.bundle.manifest.latents
        width, height = (side // settings.downscale for side in job.size)
        prompt = self._conditions(job, texts[0], False)
        negative = None if texts[1] is None else self._conditions(job, texts[1], True)
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
                inpaints=self._inpaints,
            )
            rows.append(
                Row(job.table, job.guidance, generator, prompt, negative, start.latents, start.kept, start.channels)
            )
        return rows

    def __call__(self, prompt: str = "", **options: Any) -> Result:
        """`generate` with plain keywords.

        They are those of `Request` (guidance as a number), `guidance_mode`, `guidance_interval`, `guidance_rescale`,
        and those of `generate`: `batch`, `low_memory`, `callback`.
        """
        run = {key: options.pop(key) for key in _RUN if key in options}
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
            near = difflib.get_close_matches(name, [*known, *_GUIDANCE, *_RUN], n=1)
            raise RequestError(f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        return self.generate(Request(prompt, **options), **run)

    def _size(self, request: Request, image: Image.Image | None) -> tuple[int, int]:
        """Width and height: those asked for, else of the image where it is redrawn whole, else the checkpoint's."""
        manifest = self.bundle.manifest
        unit, channels = manifest.latents.downscale, manifest.latents.channels
        if request.starts_from_latents:
            found = request.image.shape
            if found[1] != channels:
                raise RequestError(f"latents must have {channels} channels, found shape {found}")
            return unit * found[3], unit * found[2]
        width, height = manifest.default_width, manifest.default_height
        if image is not None and request.task == "img2img":
            width, height = (max(side // unit, 1) * unit for side in image.size)
        width = width if request.width is None else request.width
        height = height if request.height is None else request.height
        for name, value in (("width", width), ("height", height)):
            if value < unit or value % unit or value > LARGEST_SIDE:
                near = min(max(unit, round(value / unit) * unit), LARGEST_SIDE)
                raise RequestError(
                    f"{name} must be a multiple of {unit} from {unit} to {LARGEST_SIDE}, found {value}: try {near}"
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
    if manifest.family not in _FAMILIES:
        raise BundleError(f"{root} is of the family {manifest.family!r}; this version runs {', '.join(_FAMILIES)}")
    if manifest.precision not in _PRECISIONS:
        raise BundleError(f"{root} has precision {manifest.precision!r}; this version runs {_PRECISIONS[0]}")
    known = [task for task in manifest.tasks if task in _TASKS]
    if not known:
        raise BundleError(
            f"{root} holds the tasks {', '.join(manifest.tasks) or '(none)'}; this version runs {', '.join(_TASKS)}"
        )
    if not manifest.prompts:
        raise BundleError(f"{root}: field 'prompts' is empty; compile the bundle again")
    for name in ("unet", *manifest.prompts, *(part for task in known for part in _TASKS[task])):
        bundle.component(name)
    if not bundle.foreign:
        folders = tuple(f"{prompt.tokenizer}/" for prompt in manifest.prompts.values())
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


def _given(hidden: Array | None, pooled: Array | None) -> Embedding | None:
    return None if hidden is None else Embedding(hidden, pooled)


def _ask(request: Request) -> Ask:
    texts = (request.prompt, request.prompt if request.prompt_2 is None else request.prompt_2)
    return Ask(texts, request.clip_skip or 0, request.weights, request.windows)


def _asks(job: _Job, zeros: bool) -> tuple[Ask | None, Ask | None]:
    """What the text encoders are asked for the prompt and the negative prompt, if they are.

    zeros: whether no negative prompt means zeros. Layers are skipped for the prompt alone, as in diffusers.
    """
    request = job.request
    prompt = None if request.prompt_embeds is not None else _ask(request)
    none = request.negative_prompt is None and zeros
    if not job.guidance.active or request.negative_prompt_embeds is not None or none:
        return prompt, None
    text = request.negative_prompt or ""
    second = text if request.negative_prompt_2 is None else request.negative_prompt_2
    return prompt, Ask((text, second), 0, request.weights, request.windows)


def _record(request: Request) -> dict[str, Any]:
    """What makes the request again, as JSON values."""
    record: dict[str, Any] = {}
    for item in fields(request):
        value = getattr(request, item.name)
        if item.name in _RECORDED or (value is not None and not _is_default(item, value)):
            record[item.name] = _described(value)
    return record


def _is_default(item: Any, value: Any) -> bool:
    if isinstance(value, (np.ndarray, Image.Image)):
        return False
    return bool(value == (item.default_factory() if callable(item.default_factory) else item.default))


def _described(value: Any) -> Any:
    """A picture or an array by its path or its hash."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (np.ndarray, Image.Image)):
        return f"sha256:{hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    return asdict(value) if isinstance(value, Conditioning) else value


def _cuts(texts: tuple[Embedding, Embedding | None]) -> dict[str, str]:
    """What was left out of each prompt, by the name of the prompt."""
    named = zip(("prompt", "negative_prompt"), texts, strict=True)
    cuts = {name: max(text.cut, key=len, default="") for name, text in named if text is not None}
    return {name: cut for name, cut in cuts.items() if cut}
