"""`load(bundle)` and the `Pipeline` that turns prompts into images."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from ..bundle import Bundle
from ..bundle.wiring import TASKS
from ..common.arrays import Array
from ..common.checks import MOST_IMAGES, MOST_THREADS, whole_number
from ..common.errors import BundleError, EngineError, LoraError, RequestError, StoppedError
from ..engines import Engine
from ..engines.changed import Changes, Rows
from ..engines.loader import EngineLoader
from ..engines.runnable import check_runnable
from ..families import open_bundle
from ..families.control import mode_names
from ..families.lora import LoraFile, combined
from ..families.lora.embeddings import matrix_of
from .conditions.condition import Fed, Job
from .jobs import Jobs
from .loaded import Form, LoadedEngines
from .loop.batch import Batch, likeness
from .loop.device import HOST_ONLY, DeviceStepper
from .loop.guidance import SKIPPING, Guidance
from .loop.host import HostStepper
from .loop.noise import GENERATORS
from .loop.sample import Sample, Skipping
from .lora import Lora, as_inversions, as_loras, described, open_inversions, printable
from .lora_sets import LoraSets
from .names import ours
from .pictures.autoencoder import DECODERS, Autoencoder, check_decoder
from .pictures.images import to_image
from .pictures.tiling import Parts, finished
from .request import Request
from .run import Callback, Progress, Ready, Result, Run

GUIDANCE = {
    "guidance": "scale",
    "guidance_mode": "mode",
    "guidance_interval": "interval",
    "guidance_rescale": "rescale",
    **{name: name for name in ("true_cfg_scale", *SKIPPING)},
}
"""The fields of a `Guidance`, by the names of options."""
_CHEAP_RANK = 64
"""The most that LoRAs are inputs with where nothing is said: each call takes longer, the more the higher."""
_RUN = ("batch", "low_memory", "callback")
_OPTIONS = tuple(item.name for item in fields(Request) if item.name != "prompt")


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
        wrap: Callable[[str, Engine], Engine] | None = None,
    ) -> None:
        """engine: one of `engines.names.ENGINES`; the default is what the bundle was compiled for.

        precision: of the models; the default is what the bundle was made for, but on the CPU fp32, unless it was made
        for this very engine in a lower one.
        loop: where the step of the loop runs, `host` or `device` (the `step` graph of the bundle). By default it is
        the host on the CPU, where it is the faster one, and the device elsewhere.
        weight_budget: bytes of weights that a plan built with weight streaming keeps on the GPU.
        engines: what loads a component, by its name, in place of the bundle's own engines.
        wrap: makes of a component's name and its engine, when it is loaded, the engine that is used in its place.
        Raises `BundleError` for a bundle of another kind, `EngineError` when the engine is not there.
        """
        from ..engines.onnxruntime import default_threads

        check_runnable(bundle)
        if threads is not None:
            threads = whole_number("threads", threads, 1, MOST_THREADS)
        if loop not in (None, "host", "device"):
            raise RequestError(f"unknown loop {loop!r}: choose one of host, device")
        self.bundle = bundle
        self._loader = EngineLoader(bundle, engine, precision, weight_budget)
        self._denoiser, steps = bundle.manifest.named("denoiser"), bool(bundle.manifest.with_role("step"))
        if loop == "device" and not steps:
            raise BundleError(f"{bundle.root} holds no step graph: compile it again, or use the loop 'host'")
        self._loop_asked = loop
        self._loop = loop or ("device" if steps and not self._loader.engine.on_cpu else "host")
        self._engines = LoadedEngines(bundle, self._loader, threads or default_threads(), engines or {}, wrap)
        self._autoencoder = Autoencoder(bundle, self.engine)
        self._sets = LoraSets(bundle, self._loader.lora)
        self._jobs = Jobs(bundle, self.engine, self._autoencoder, self._sets, self._adapted)
        self._loras: tuple[Lora, ...] = ()
        self._changes: Mapping[str, Changes] = {}
        self._rows: Mapping[str, Rows] = {}
        self._words: Mapping[str, Mapping[str, Array]] = {}
        self._embeddings_record: list[str] = []
        self._opened: list[tuple[LoraFile, Mapping[str, float]]] = []

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs that it draws with."""
        return self._loras

    def set_loras(self, loras: Sequence[Any], *, as_inputs: bool | None = None) -> None:
        """Draw with these LoRAs from now on, [] for none: then it is the bare model again, exactly.

        loras: each a `Lora`, a path, a text `FILE=0.8`, or a pair of a path and a strength.
        as_inputs: whether the denoiser takes them as inputs: a change takes milliseconds, each step a little longer.
        Else the weights that they change are computed anew, over those of the bundle; the parts that have them are
        loaded again when they are next used, and steps take as long as ever. Where the bundle has no denoiser with such
        inputs, ONNX Runtime on the CPU is given one made of the plain one in memory, in about a second.
        The default is as inputs, where all are of a form and rank for it, if the bundle has such a denoiser; if it has
        none, then in a pipeline that has drawn already, whose denoiser is large and goes without controls.
        In no case is anything traced or built. It is not to be called while the pipeline draws.
        Raises `LoraError` for a file that cannot be read or is for another model, `EngineError` where the engine or
        the precision holds weights that cannot be changed; the pipeline is then as it was.
        """
        self._engines.check_process()
        if as_inputs not in (None, True, False):
            raise RequestError(f"as_inputs must be true, false or None, found {as_inputs!r:.80}")
        asked = as_loras(loras)
        with self._sets.reading_again():
            opened = self._sets.opened(asked) if asked else []
            given = self._are_inputs(asked, as_inputs)
            self._change({} if given else combined(opened), self._rows)
            self._sets.set_base(asked if given else ())
        if not self._loader.lora.built:  # the weights are in memory once
            self._engines.release(self._denoiser if given else self._loader.lora.name)
        self._loras, self._opened = asked, opened

    @property
    def lora_denoiser(self) -> str:
        """The name of the denoiser that takes LoRAs as inputs, of the bundle or in memory; "" where there is none.

        Requests may then have LoRAs of their own.
        """
        return "" if self._loader.lora.lacks else self._loader.lora.name

    def set_embeddings(self, embeddings: Sequence[Any]) -> None:
        """Let prompts have these new words from now on, [] for none.

        embeddings: textual inversions, each a `TextualInversion`, a path, or a text `FILE=WORD`. A word of several
        vectors is spelt out as diffusers does. Errors are those of `set_loras`.
        """
        self._engines.check_process()
        asked = as_inversions(embeddings)
        words = open_inversions(asked, self._sets.weights) if asked else {}
        encoders = self._jobs.text.encoders
        rows = encoders.set_words(words)
        placed = {name: {matrix_of(self._sets.weights, name)[0]: each} for name, each in rows.items()}
        try:
            self._change(self._changes, placed)
        except BaseException:
            encoders.set_words(self._words)
            raise
        self._words, self._embeddings_record = words, [printable(str(each)) for each in asked]

    def _change(self, changes: Mapping[str, Changes], rows: Mapping[str, Rows]) -> None:
        """Load parts with these weights when they are next used. Raises `EngineError`; all is then as it was."""
        changed = self._loader.changed | {*changes, *rows}
        self._loader.change(changes, rows)
        self._changes, self._rows = changes, rows
        roles = {name: self.bundle.component(name).role for name in self.bundle.manifest.components}
        also = {self._loader.lora.name, *(name for name, role in roles.items() if role == "controlled")}
        if changed:
            self._engines.release(*changed, *(also if self._denoiser in changed else ()))

    def _are_inputs(self, loras: Sequence[Lora], asked: bool | None) -> bool:
        """Whether the denoiser takes these LoRAs as inputs. Raises `LoraError` where it is asked to and cannot."""
        lora = self._loader.lora
        if not loras or asked is False or (asked is None and not self._prefers_inputs()):
            return False
        try:
            if lora.lacks:
                self._sets.of(loras)
            down, _ = self._sets.factors(loras)
        except LoraError:
            if asked:
                raise
            return False
        return bool(asked) or lora.built or down.shape[1] <= _CHEAP_RANK

    def _prefers_inputs(self) -> bool:
        """Whether LoRAs are better inputs, where they can be. Weights not yet loaded cost nothing to change."""
        lora, loaded = self._loader.lora, self._engines.names
        if lora.built or lora.lacks:
            return lora.built
        is_large = not self._loader.is_small(self._denoiser) and not self.bundle.manifest.named("controlled")
        return is_large and (self._denoiser in loaded or lora.name in loaded)

    def _adapted(self, name: str, loras: Sequence[Lora]) -> Engine:
        return self._engines.adapted(name, loras, self._sets)

    def engine(self, name: str) -> Engine:
        """The engine of component `name`, loaded on first use.

        Raises `BundleError` when its files were changed, `EngineError` when it cannot be loaded.
        """
        return self._engines(name)

    def info(self) -> dict[str, Any]:
        """What runs the bundle: `engine`, `precision`, and the plan that served each component, where it has plans."""
        self._engines.check_process()
        return self._loader.info()

    def __reduce__(self) -> NoReturn:
        """Pickling and copying. Raises `EngineError`: engines belong to the process that loaded them."""
        raise EngineError("a pipeline cannot be copied or sent to another process: load the bundle there")

    @property
    def loaded(self) -> list[str]:
        """The names of the components whose engines are in memory."""
        return self._engines.names

    def weight_bytes(self, name: str) -> int:
        """The bytes on disk of the model of component `name`, in the precision that is run."""
        return self._loader.size_of(name)

    def release(self, name: str) -> None:
        """Drop the engine of component `name` and its memory; the next use loads it again."""
        self._engines.release(name)

    def release_all(self) -> None:
        """Drop every engine and its memory."""
        self._engines.release(*self.bundle.manifest.components, self._loader.lora.name)

    def encode(self, prompts: Sequence[str]) -> tuple[Array, list[str]]:
        """Text embeddings, (len(prompts), tokens, width), and what was cut off each prompt."""
        self._engines.check_process()
        return self._jobs.text.embeddings(prompts)

    def decode(self, latents: Array, decoder: str = "full", *, tiled: bool = False) -> Array:
        """Pixels in [-1, 1], float (N, 3, H, W), of latents (N, C, H/downscale, W/downscale); one image at a time."""
        check_decoder(self.bundle, decoder)
        return self._autoencoder.decode(latents, decoder, tiled=tiled)

    def preview(self, latents: Array) -> list[Image.Image]:
        """Pictures of latents on their way, by the tiny decoder. Raises `RequestError` when the bundle has none."""
        return [to_image(sample) for sample in self.decode(np.nan_to_num(latents), "tiny")]

    def check(self, request: Request) -> tuple[int, int]:
        """The width and height that `request` makes. Raises `RequestError` for what the bundle cannot do."""
        return self.job(request).size

    def job(self, request: Request) -> Job:
        """`request` held against the bundle, with its seeds and its schedule. Nothing is loaded.

        Raises `RequestError` for what the bundle cannot do, `LoraError` for a LoRA that cannot be read or taken.
        """
        (job,), _ = self._check([request], None)
        return job

    def prepare(self, jobs: Sequence[Job]) -> list[Ready]:
        """What the rows of these jobs start from: texts of several are encoded in one call, pictures one by one.

        Jobs may differ in everything. Raises `EngineError` when an engine fails.
        """
        alike: dict[tuple[Form, tuple[int, int]], list[int]] = {}
        for i, job in enumerate(jobs):
            alike.setdefault((self._form([job]), job.size), []).append(i)
        ready: dict[int, Ready] = {}
        for (form, _), places in alike.items():
            for part in [places] if self._feed_together([jobs[i] for i in places]) else [[i] for i in places]:
                fed = self._feed([jobs[i] for i in part], False, {})
                for i, given in zip(part, fed, strict=True):
                    ready[i] = Ready(jobs[i], self._samples(jobs[i], given), dict(given.truncated), form)
        return [ready[i] for i in range(len(jobs))]

    def kind(self, job: Job) -> Hashable:
        """Equal for jobs whose rows one batch can step, most likely: `group` knows, when they are prepared."""
        return self._form([job]), job.size

    def group(self, ready: Ready, i: int = 0) -> Hashable:
        """Equal for those whose rows one batch steps; i: the image. Loads the denoiser."""
        if self._engines.one_timestep(ready.form):
            return id(ready), i
        device = self._loop == "device" and self._engines.phases(ready.form).fits(ready.samples[0])
        return ready.form, device, likeness(ready.samples[0])

    def batch(self, ready: Ready) -> Batch:
        """An empty batch for rows of this group."""
        return Batch(self._stepper(ready.samples, ready.form))

    def most_rows(self, job: Job) -> int:
        """The most images such as those of `job` that one batch takes."""
        return self._most_images([job])

    def abilities(self) -> dict[str, Any]:
        """What requests may ask of the bundle, as JSON values.

        `fields`: by task, those of `Request` that change what is drawn with guidance. `schedulers`: names that work in
        the bundle's own number of steps; `scheduler`: its own. `strength`: by task, where a request does not say.
        `unguided`: the guidance that is none. `largest_side`: pixels. `clip_skip`, `max_sequence_length`: the most, 0
        where it takes none. `layers`: of the denoiser, that guidance may skip, 0 for none. `decoders`: what `decoder`
        may be. `control_modes`: of each ControlNet-Union; `masked_controls`: those that need a mask of their own;
        `guess_modes`: those that have a guess mode. `pictured`: the IP-Adapters that take pictures; `several`: those
        that read more than one; `regions`: those that take masks; `attentions`: how many read each.
        """
        jobs, manifest = self._jobs, self.bundle.manifest
        schedules, encoders, wiring = jobs.schedules, jobs.text.encoders, manifest.wiring
        return {
            "fields": {task: sorted(jobs.fields(task)) for task in manifest.tasks},
            "scheduler": schedules.named(None),
            "schedulers": schedules.usable,
            "strength": {task: schedules.strength(task) for task in manifest.tasks if task != "txt2img"},
            "unguided": 1 - wiring.guidance_added,
            "largest_side": jobs.largest_side,
            "clip_skip": encoders.most_skipped,
            "max_sequence_length": encoders.longest,
            "layers": jobs.layers,
            "decoders": [name for name, role in DECODERS.items() if manifest.named(role)],
            "control_modes": {name: list(mode_names(each)) for name, each in wiring.controls.items() if each.modes},
            "masked_controls": [name for name, each in wiring.controls.items() if each.masked],
            "guess_modes": [name for name, each in wiring.controls.items() if each.guess and each.kind != "adapter"],
            "pictured": [name for name, each in wiring.image_prompts.items() if each.encoder],
            "several": [name for name, each in wiring.image_prompts.items() if each.several],
            "regions": [name for name, each in wiring.image_prompts.items() if each.masks],
            "attentions": {name: each.layers for name, each in wiring.image_prompts.items()},
        }

    def plan_sizes(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """The least and the largest picture, (width, height), of each plan of the denoiser; [] where it takes any."""
        down = self.bundle.manifest.latents.downscale
        return [
            ((low[1] * down, low[0] * down), (high[1] * down, high[0] * down))
            for low, high in self._loader.plan_sizes()
        ]

    def picture(self, job: Job, latents: Array) -> Image.Image:
        """The picture of the final latents of one image of `job`, float32 (C, H/downscale, W/downscale)."""
        return finished(self.picture_parts(job, latents))

    def picture_parts(self, job: Job, latents: Array) -> Parts[Image.Image]:
        """`picture` as work that can be left between the tiles of a tiled request, and taken up again."""
        request = job.request
        pixels = yield from self._autoencoder.decoding(latents[None], request.decoder, tiled=request.tiled)
        image = to_image(pixels[0])
        return image if job.picture is None else job.picture.finish(image)

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
        callback: see `run.Callback`; it counts the steps of all batches, each as long as its longest row.
        Raises `RequestError` for what the bundle cannot do, before anything is run.
        """
        jobs, most = self._check(requests, batch)
        if callback is not None and not callable(callback):
            raise RequestError(f"callback must be callable, found {type(callback).__name__}")
        with closing(Run(self._run(jobs, most, low_memory, at_once=None if callback is None else 1))) as run:
            for progress in run:
                answer = None if callback is None else callback(progress.step, progress.total, progress.latents)
                if isinstance(answer, (bool, np.bool_)) and not answer:
                    raise StoppedError(f"stopped by the callback after step {progress.step} of {progress.total}")
        return run.results

    def steps(self, request: Request, *, batch: int | None = None, low_memory: bool = False) -> Run:
        """Run `request` step by step: an iterator of `run.Progress` that can be left at any time; see `run.Run`.

        Options as for `generate_many`. Raises `RequestError` for what the bundle cannot do, before the first step.
        """
        jobs, most = self._check([request], batch)
        return Run(self._run(jobs, most, low_memory, at_once=1))

    def _check(self, requests: Sequence[Request], batch: int | None) -> tuple[list[Job], int]:
        """Hold requests against the bundle and each other. Returns them and the images of one batch."""
        self._engines.check_process()
        if not isinstance(requests, Sequence) or not all(isinstance(request, Request) for request in requests):
            raise RequestError("generate_many takes a list of Request")
        jobs = [self._jobs.make(request) for request in requests]
        for job in jobs if self._loras else ():
            job.record["loras"] = [*described(self._opened, self._loras), *job.record.get("loras", ())]
        for job in jobs if self._embeddings_record else ():
            job.record["embeddings"] = self._embeddings_record
        total = sum(job.request.count for job in jobs)
        if not jobs or total > MOST_IMAGES:
            raise RequestError(f"a batch must have from 1 to {MOST_IMAGES} images, found {total}")
        if len({job.size for job in jobs}) > 1:
            raise RequestError("the requests of one batch must have one size: run other sizes on their own")
        on_host = any(job.request.mask is not None or job.guidance.split or job.guidance.skips for job in jobs)
        if self._loop_asked == "device" and (on_host or not self._engines.on_device(self._form(jobs))):
            raise RequestError(HOST_ONLY)
        self._jobs.check(jobs)
        return jobs, MOST_IMAGES if batch is None else whole_number("batch", batch, 1, MOST_IMAGES)

    def _run(
        self, jobs: Sequence[Job], batch: int, low_memory: bool, at_once: int | None
    ) -> Generator[Progress, None, list[Result]]:
        """Feed, load, run, collect. at_once: the steps between two yields, None for as many as go in one piece."""
        seconds: dict[str, float] = {}
        for role in {DECODERS[job.request.decoder] for job in jobs if job.request.output != "latent"}:
            self._engines.check(self.bundle.manifest.named(role))  # what comes last fails first
        fed = self._feed(jobs, low_memory, seconds)
        form = self._form(jobs)
        with _timed(seconds, "load"):
            self._engines.denoiser(form)
        samples = [sample for job, given in zip(jobs, fed, strict=True) for sample in self._samples(job, given)]
        latents = yield from self._loop_over(samples, form, min(batch, self._most_images(jobs)), at_once, seconds)
        if low_memory:
            self._engines.release_denoiser()
        results, ends = [], np.cumsum([job.request.count for job in jobs])
        for job, given, own in zip(jobs, fed, np.split(latents, ends[:-1]), strict=True):
            images = [] if job.request.output == "latent" else self._images(job, own, seconds)
            results.append(Result(images, job.seeds, job.record, dict(given.truncated), seconds, own))
        return results

    def _feed_together(self, jobs: Sequence[Job]) -> bool:
        """Whether the conditions can feed these jobs in one batch."""
        try:
            self._jobs.check(jobs)
        except RequestError:
            return False
        return True

    def _form(self, jobs: Sequence[Job]) -> Form:
        """Which denoiser draws these jobs."""
        controls = self._jobs.controls_of(jobs)
        return Form(None if controls is None else tuple(controls), max((job.lora_layout for job in jobs), default=0))

    def _feed(self, jobs: Sequence[Job], low_memory: bool, seconds: dict[str, float]) -> list[Fed]:
        """What the conditions give each job."""
        fed = [Fed() for _ in jobs]
        prompted = any(job.request.image_prompt for job in jobs)
        loaded = {"text", *(["image"] if prompted else []), *(role for job in jobs for role in TASKS[job.request.task])}
        loaded |= {"encoder"} if self._jobs.encode_controls(jobs) else set()
        for condition in self._jobs.conditions:
            role = condition.loads
            with _timed(seconds, role) if role in loaded else nullcontext():
                fed = [before | more for before, more in zip(fed, condition.feed(jobs), strict=True)]
            if low_memory and role is not None:
                names = self.bundle.manifest.with_role(role)
                names += self.bundle.manifest.with_role("image_prompt") if role == "image" else []
                self._engines.release(*names)
        return fed

    def _loop_over(
        self,
        samples: Sequence[Sample],
        form: Form,
        most: int,
        at_once: int | None,
        seconds: dict[str, float],
    ) -> Generator[Progress, None, Array]:
        """Step the samples, `most` in one batch, and return their final latents."""
        parts = [samples[i : i + most] for i in range(0, len(samples), most)]
        total = sum(max(sample.table.steps for sample in part) for part in parts)
        done, latents = 0, []
        for part in parts:
            with closing(Batch(self._stepper(part, form))) as batch:
                handles = [batch.add(sample) for sample in part]
                while batch:
                    with _timed(seconds, "loop"):
                        done += batch.step(at_once)
                        now = np.stack([batch.latents(handle) for handle in handles])
                    yield Progress(done, total, now)
                latents += [batch.take(handle) for handle in handles]
        return np.stack(latents)

    def _stepper(self, samples: Sequence[Sample], form: Form) -> HostStepper | DeviceStepper:
        """The loop on the device where it was asked for, or is the faster one and takes these samples."""
        if self._loop == "device":
            phases = self._engines.phases(form)
            if self._loop_asked == "device" or all(phases.fits(sample) for sample in samples):
                return DeviceStepper(phases)
        return self._engines.host_stepper(form)

    def _most_images(self, jobs: Sequence[Job]) -> int:
        """The most images that one call of the U-Net takes."""
        width, height = (side // self.bundle.manifest.latents.downscale for side in jobs[0].size)
        rows = self._loader.most_rows(height, width)
        joint = any(job.guidance.active and job.guidance.mode == "joint" for job in jobs)
        return MOST_IMAGES if rows is None else max(1, rows // (2 if joint else 1))

    def _images(self, job: Job, latents: Array, seconds: dict[str, float]) -> list[Image.Image]:
        with _timed(seconds, DECODERS[job.request.decoder]):
            return [self.picture(job, each) for each in latents]

    def _samples(self, job: Job, fed: Fed) -> list[Sample]:
        """The rows of a job. fed: by its conditions."""
        inputs = self.bundle.manifest.wiring.inputs
        same = {**fed.inputs, **{name: fed.prompt[source] for name, source in fed.of_prompt.items()}}
        prompt, negative = (
            {**{name: half[source] for name, source in inputs.items() if source in half}, **more}
            for half, more in ((fed.prompt, same), (fed.negative, {**same, **fed.negative_inputs}))
        )
        if fed.start is None:
            raise RequestError(f"{self.bundle.root} cannot start the task {job.request.task}: compile it again")
        generators = [GENERATORS[job.request.rng](seed) for seed in job.seeds]
        drawn = [fed.drawn(generator) if fed.drawn else {} for generator in generators]

        def skipping(own: Mapping[str, Array]) -> Skipping | None:
            if not fed.skipped_inputs:
                return None
            scale, start, stop = (getattr(job.guidance, name) for name in SKIPPING[1:])
            return Skipping({**prompt, **own, **fed.skipped_inputs}, scale, job.steps * start, job.steps * stop)

        return [
            Sample(
                job.table,
                job.guidance,
                generator,
                {**prompt, **own},
                {**negative, **own} if job.guidance.active else None,
                *fed.start(i, generator),
                fed.prompt_steps,
                fed.negative_steps,
                skipping(own),
            )
            for i, (generator, own) in enumerate(zip(generators, drawn, strict=True))
        ]

    def __call__(self, prompt: str = "", **options: Any) -> Result:
        """`generate` with plain keywords.

        They are those of `Request` (guidance as a number), `guidance_mode`, `guidance_interval`, `guidance_rescale`,
        `true_cfg_scale`, `skip_guidance_layers` and `skip_layer_guidance_scale`, `_start` and `_stop`, and those of
        `generate`: `batch`, `low_memory`, `callback`. Raises `RequestError` for others.
        """
        options = ours(options, (*_OPTIONS, *GUIDANCE, *_RUN))
        run = {key: options.pop(key) for key in _RUN if key in options}
        guidance = {field_name: options.pop(key) for key, field_name in GUIDANCE.items() if key in options}
        whole = guidance.get("scale")
        if isinstance(whole, Guidance) and len(guidance) > 1:
            raise RequestError("give the guidance as one Guidance, or as numbers")
        options["guidance"] = whole if isinstance(whole, Guidance) else Guidance(**guidance)
        return self.generate(Request(prompt, **options), **run)


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


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of its block to `seconds[name]`."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
