"""What is to be measured: as it is asked for, and as it stands against a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bundle import Bundle
from ..common.errors import RequestError
from ..engines.onnxruntime import default_threads
from ..runtime.loop.guidance import Guidance
from ..runtime.pipeline import Pipeline
from ..runtime.request import Request
from .report import ScenarioName, Settings

PROMPT = "a large red star at the left on a navy background"


@dataclass(frozen=True, slots=True)
class Options:
    """What is to be measured. None stands for the bundle's own default, or for one that fits what is measured.

    checkpoint: a folder in the diffusers layout, for peers that need it. versus: names of peers. command: the line that
    makes the run again.
    """

    bundle: Path
    checkpoint: Path | None = None
    versus: tuple[str, ...] = ()
    scenario: ScenarioName = "single"
    engine: str | None = None
    precision: str | None = None
    threads: int | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    prompt: str = PROMPT
    negative_prompt: str | None = None
    seed: int = 7
    turns: int | None = None
    cold: int = 3
    batch: int = 8
    p99_s: float | None = None
    command: str = "diffoundry bench"


def settings_of(options: Options, bundle: Bundle, engine: str, precision: str) -> tuple[Settings, tuple[int, int, int]]:
    """The request as it is measured, and the shape of its latents (C, h, w). Raises `RequestError`."""
    manifest = bundle.manifest
    if "txt2img" not in manifest.tasks:
        raise RequestError(
            f"bench draws from a prompt alone, which {bundle.root} does not: its tasks are {', '.join(manifest.tasks)}"
        )
    guidance = manifest.default_guidance if options.guidance is None else options.guidance
    steps = manifest.default_steps if options.steps is None else options.steps
    request = Request(
        options.prompt,
        options.negative_prompt,
        steps=steps,
        guidance=Guidance(guidance),
        scheduler=options.scheduler,
        seed=options.seed,
        count=options.batch,
        width=options.width,
        height=options.height,
    )
    pipeline = Pipeline(bundle, engine=options.engine, precision=options.precision, threads=options.threads)
    width, height = pipeline.check(request)
    settings = Settings(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=guidance,
        scheduler=options.scheduler,
        seed=options.seed,
        count=1,
        engine=engine,
        precision=precision,
        threads=options.threads or default_threads(),
        scenario=options.scenario,
        turns=options.turns or 0,
        cold=options.cold,
        batch=options.batch,
        p99_s=options.p99_s if options.scenario == "server" else None,
    )
    latents = manifest.latents
    return settings, (latents.channels, height // latents.downscale, width // latents.downscale)
