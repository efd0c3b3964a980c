"""`diffoundry compile`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .options import read_counts, read_pairs
from .progress import progress


@click.command("compile")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(), help="The bundle folder to make.")
@click.option(
    "--engine",
    type=click.Choice(["onnxruntime"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the models.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What the engines are built for.",
)
@click.option(
    "--precision", type=click.Choice(["fp32"]), default="fp32", show_default=True, help="Of weights and activations."
)
@click.option(
    "--family",
    type=click.Choice(["stable-diffusion", "stable-diffusion-xl", "latent-consistency"]),
    help="Override the family found in model_index.json.",
)
@click.option(
    "--tasks",
    metavar="TASK,…",
    help="What the bundle is for: txt2img, img2img, inpaint. [default: all that the checkpoint can do]",
)
@click.option(
    "--component",
    "components",
    multiple=True,
    metavar="NAME=FOLDER",
    help="Another folder for a component (unet, scheduler, vae …); vae_tiny adds an AutoencoderTiny. May be repeated.",
)
@click.option(
    "--config",
    type=click.Path(),
    help="For a single file: a diffusers folder whose configurations and tokenizer go with its weights.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="For a single file: what its U-Net predicts.",
)
@click.option("--default-steps", type=int, help="What `run` takes for --steps. [default: the family's]")
@click.option("--default-guidance", type=float, help="What `run` takes for --guidance. [default: the family's]")
@click.option(
    "--trace-scheduler",
    metavar="CLASS",
    help="Read the tables of this diffusers class, or module:Class, off its code, for the --steps named.",
)
@click.option("--steps", metavar="N,N,…", help="Step counts of --trace-scheduler.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def compile_command(
    checkpoint: str,
    output: str,
    engine: str,
    device: str,
    precision: str,
    family: str | None,
    tasks: str | None,
    components: tuple[str, ...],
    config: str | None,
    prediction_type: str | None,
    default_steps: int | None,
    default_guidance: float | None,
    trace_scheduler: str | None,
    steps: str | None,
    as_json: bool,
) -> None:
    """Compile CHECKPOINT into a bundle.

    CHECKPOINT is a folder in the diffusers layout, a single file (.safetensors, .ckpt) in the layout of the original
    authors, or a hub id (owner/name) when online. Each component is traced to
    ONNX, held against torch on three random shapes, and built for this machine. A compile that was stopped goes on
    where it was; a finished stage is not done twice.
    """
    from ..bundle import DiffoundryError
    from ..export import compile
    from ..runtime.schedules import Schedules

    if ":" in (trace_scheduler or ""):
        sys.path.insert(0, str(Path.cwd()))  # a module of one's own lies where one stands
    with progress("compile", shown=not as_json) as report:
        bundle = compile(
            checkpoint,
            output,
            engine=engine,
            device=device,
            precision=precision,
            family=family,
            tasks=None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()],
            components=read_pairs("--component", components, "NAME=FOLDER"),
            config=config,
            prediction_type=prediction_type,
            default_steps=default_steps,
            default_guidance=default_guidance,
            trace_scheduler=trace_scheduler,
            steps=tuple(read_counts("--steps", steps)),
            progress=report,
        )
    worst = _worst_error(bundle.root)
    if as_json:
        print(json.dumps({"bundle": str(bundle.root), "max_abs_error": worst}))
    else:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        click.echo(f"{output} is ready. Largest difference to torch: {errors}")
        try:
            Schedules(bundle).named(None)
        except DiffoundryError as error:
            click.echo(f"Note: {error}", err=True)


def _worst_error(root: object) -> dict[str, float]:
    from ..bundle.files import read_json

    parity = read_json(Path(str(root)) / "reports" / "parity.json", "the parity report")
    return {
        name: max(case["max_abs_error"] for case in part["cases"]) for name, part in parity.items() if name != "step"
    }
