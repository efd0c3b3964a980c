"""`diffoundry compile`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..bundle.precisions import STORAGE_DTYPES, VALIDATIONS
from ..families import FAMILIES
from .controls import read_loras
from .goal import goal_options, show_result, take_goal
from .options import COUNTS, ENGINES, engine_option, json_option, precision_option, read_list, read_pairs
from .progress import progress


@click.command("compile")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(), help="The bundle folder to make.")
@engine_option(
    f"What runs the models: {ENGINES}; or auto: the fastest of those that are installed for this processor.",
    default="auto",
)
@precision_option(
    "Of weights and activations. What the lower ones would spoil stays in fp32. [default: fp32, or with --engine auto "
    "what is faster within --min-psnr]"
)
@click.option(
    "--storage-dtype",
    type=click.Choice(STORAGE_DTYPES),
    help="Of the weights in the fp32 models. auto: that of the checkpoint, for less disk, and less memory to compile "
    "(default: auto for transformers, fp32 for U-Nets).",
)
@click.option(
    "--validate",
    type=click.Choice(VALIDATIONS),
    help="Hold whole transformers against torch, or twins with a few of their layers (default: the whole where there "
    "is memory for it).",
)
@goal_options
@click.option(
    "--family",
    metavar="FAMILY",
    help=f"Override the family found in model_index.json: {', '.join(FAMILIES)}, or module:FAMILY of your own.",
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
    metavar="NAME=FOLDER_OR_FILE",
    help="Another folder for a component (unet, scheduler, vae …), or a single file for a model; vae_tiny adds an "
    "AutoencoderTiny. May be repeated.",
)
@click.option(
    "--controlnet",
    "controlnets",
    multiple=True,
    metavar="NAME=FOLDER_OR_FILE",
    help="A ControlNet that `run --control NAME=PICTURE` steers by. Give all that the bundle is to have.",
)
@click.option(
    "--t2i-adapter",
    "t2i_adapters",
    multiple=True,
    metavar="NAME=FOLDER",
    help="A T2I-Adapter, which is lighter; used as a ControlNet is. Give all that the bundle is to have.",
)
@click.option(
    "--ip-adapter",
    "ip_adapters",
    multiple=True,
    metavar="NAME=FILE_OR_FOLDER",
    help="An IP-Adapter, which lets `run --ip-image` take pictures beside the prompt. Give all it is to have.",
)
@click.option(
    "--image-encoder",
    type=click.Path(),
    help="The folder of the image encoder of --ip-adapter. [default: image_encoder beside its file]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=STRENGTH[:TEXT]]",
    help="A LoRA to change the weights by for good; TEXT is its strength in the text encoders. May be repeated.",
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="FILE[=WORD]",
    help="A textual inversion, whose word prompts may have. May be repeated.",
)
@click.option("--lora-ignore-unused", is_flag=True, help="Leave out what of a LoRA changes nothing in CHECKPOINT.")
@click.option(
    "--config",
    type=click.Path(),
    help="For a single file: a diffusers folder whose configurations and tokenizers go with its weights, and whose "
    "own weights stand in for parts of FLUX.1, SD3 and Z-Image that it lacks.",
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
@click.option("--steps", type=COUNTS, default=(), help="Step counts of --trace-scheduler.")
@json_option
def compile_command(
    checkpoint: str,
    output: str,
    tasks: str | None,
    components: tuple[str, ...],
    controlnets: tuple[str, ...],
    t2i_adapters: tuple[str, ...],
    ip_adapters: tuple[str, ...],
    loras: tuple[str, ...],
    lora_ignore_unused: bool,
    embeddings: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Compile CHECKPOINT into a bundle.

    CHECKPOINT is a folder in the diffusers layout, a single file (.safetensors, .ckpt) in the layout of the original
    authors, or a hub id (owner/name) when online. Each component is traced to ONNX, held against torch on three random
    shapes, and built for this machine. A compile that was stopped goes on where it was; a finished stage is not done
    twice.
    """
    from ..bundle.reports import read_report
    from ..common.errors import DiffoundryError
    from ..export import compile
    from ..runtime.schedule import Schedules

    if ":" in f"{options['trace_scheduler']}{options['family']}":
        sys.path.insert(0, str(Path.cwd()))  # a module of one's own lies where one stands
    goal = take_goal(options)
    if options["precision"] is None and options["engine"] != "auto":
        options["precision"] = "fp32"
    with progress("compile", shown=not as_json) as report:
        bundle = compile(
            checkpoint,
            output,
            tasks=None if tasks is None else read_list([tasks]),
            components=read_pairs("--component", components, "NAME=FOLDER_OR_FILE"),
            t2i_adapters=read_pairs("--t2i-adapter", t2i_adapters, "NAME=FOLDER"),
            ip_adapters=read_pairs("--ip-adapter", ip_adapters, "NAME=FILE_OR_FOLDER"),
            embeddings=embeddings,
            loras=read_loras(loras, lora_ignore_unused),
            controlnets=read_pairs("--controlnet", controlnets, "NAME=FOLDER_OR_FILE"),
            progress=report,
            **goal,
            **options,
        )
    parity, step = read_report(bundle, "parity"), bundle.manifest.named("step")
    worst = {
        name: max(case["max_abs_error"] for case in part["cases"]) for name, part in parity.items() if name != step
    }
    twins = {name: f" (of a twin, {part['twin']})" for name, part in parity.items() if "twin" in part}
    errors = ", ".join(f"{name} {error:.1e}{twins.get(name, '')}" for name, error in worst.items())
    show_result(bundle, f"{output} is ready. Largest difference to torch: {errors}", as_json, max_abs_error=worst)
    if not as_json:
        try:
            Schedules(bundle).named(None)
        except DiffoundryError as error:
            click.echo(f"Note: {error}", err=True)
