"""`diffoundry run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .options import read_numbers, read_options
from .progress import progress


@click.command("run")
@click.argument("bundle", type=click.Path())
@click.argument("prompt")
@click.option("-n", "--negative", help="What the image should not show.")
@click.option(
    "-o",
    "--output",
    default="out.png",
    show_default=True,
    type=click.Path(),
    help="PNG file to write; with --count NAME-0.png, NAME-1.png and so on.",
)
@click.option(
    "--scheduler",
    help="A name that `diffoundry schedulers` lists, or a diffusers class. [default: the checkpoint's own]",
)
@click.option(
    "--scheduler-option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="As in a scheduler_config.json, or eta; a value is JSON (true, 0.5). May be repeated.",
)
@click.option("--steps", type=int, help="Steps of the scheduler. [default: the bundle's own]")
@click.option("--timesteps", metavar="T,T,…", help="Timesteps of your own, in place of --steps.")
@click.option(
    "--sigmas",
    metavar="S,S,…",
    help="Sigmas of your own, in place of --steps; for euler also the one after the last step.",
)
@click.option("--guidance", type=float, help="1 or less turns guidance off. [default: the bundle's own]")
@click.option(
    "--guidance-mode",
    default="joint",
    show_default=True,
    type=click.Choice(["joint", "split", "off"]),
    help="Both halves in one call, in two calls of half the memory, or none.",
)
@click.option(
    "--guidance-interval",
    nargs=2,
    type=float,
    metavar="START END",
    default=(0.0, 1.0),
    show_default=True,
    help="The part of the steps, from 0 to 1, that is guided.",
)
@click.option(
    "--guidance-rescale", default=0.0, show_default=True, type=float, help="0 to 1, against overexposure (Lin 2023)."
)
@click.option("--seed", type=int, help="Of the first image; image i has seed + i. [default: random]")
@click.option(
    "--rng",
    default="cpu",
    show_default=True,
    type=click.Choice(["cpu", "cuda"]),
    help="Whose noise the seed means: torch's generator on the CPU, or on an NVIDIA GPU.",
)
@click.option("--count", default=1, show_default=True, type=int, help="Number of images.")
@click.option("--batch", default=4, show_default=True, type=click.IntRange(1), help="Most images in one U-Net call.")
@click.option("--width", type=int, help="In pixels, a multiple of 8. [default: the checkpoint's own]")
@click.option("--height", type=int, help="In pixels, a multiple of 8. [default: the checkpoint's own]")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda or tensorrt (ONNX Runtime).")
@click.option("--threads", type=click.IntRange(1, 1024), help="Processors to use. [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def run_command(
    bundle: str,
    prompt: str,
    negative: str | None,
    output: str,
    scheduler: str | None,
    options: tuple[str, ...],
    steps: int | None,
    timesteps: str | None,
    sigmas: str | None,
    guidance: float | None,
    guidance_mode: str,
    guidance_interval: tuple[float, float],
    guidance_rescale: float,
    seed: int | None,
    rng: str,
    count: int,
    batch: int,
    width: int | None,
    height: int | None,
    provider: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Draw PROMPT with BUNDLE.

    The PNG records how it was made, in its text chunk `diffoundry`.
    """
    from .. import __version__
    from ..runtime.guidance import Guidance
    from ..runtime.images import output_paths, save_png
    from ..runtime.pipeline import load
    from ..runtime.request import Request

    if steps is not None and (timesteps is not None or sigmas is not None):
        raise click.UsageError("--timesteps and --sigmas take the place of --steps: leave --steps out")
    request = Request(
        prompt=prompt,
        negative_prompt=negative,
        steps=steps,
        guidance=Guidance(guidance, guidance_mode, guidance_interval, guidance_rescale),
        scheduler=scheduler,
        scheduler_options=read_options(options),
        timesteps=read_numbers("--timesteps", timesteps),
        sigmas=read_numbers("--sigmas", sigmas),
        rng=rng,
        seed=seed,
        count=count,
        width=width,
        height=height,
    )
    paths = output_paths(Path(output), count)
    pipeline = load(bundle, provider=provider, threads=threads)
    with progress("run", shown=not as_json) as report:
        result = pipeline.generate(
            request, batch=batch, low_memory=True, callback=lambda k, total, _: report("step", k, total)
        )
    manifest = pipeline.bundle.manifest
    for path, image, own in zip(paths, result.images, result.seeds, strict=True):
        made = {**result.request, "seed": own, "count": 1, "source": manifest.source, "diffoundry": __version__}
        save_png(image, path, made)
    for name, text in result.cut.items():
        print(f"Warning: {name} is too long, this part was left out: {text}", file=sys.stderr)
    if as_json:
        print(
            json.dumps(
                {
                    "images": [{"path": str(path), "seed": own} for path, own in zip(paths, result.seeds, strict=True)],
                    "request": result.request,
                    "provider": provider,
                    "cut": result.cut,
                    "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
                },
            )
        )
    else:
        for path, own in zip(paths, result.seeds, strict=True):
            click.echo(f"{path} (seed {own})")
