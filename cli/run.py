"""`diffoundry run`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from ..bundle.wiring import MOST_TOKENS
from ..common.errors import RequestError
from .controls import read_controls, read_image_prompts, read_loras
from .options import GIB, LAYERS, NUMBERS, engine_option, json_option, precision_option, read_options, threads_option
from .progress import progress

_LONGEST_SHOWN = 200
_IP_OPTIONS = ("ip_image", "ip_embeds", "ip_scale", "ip_mask", "ip_negative")
_OF_CONTROLS = ("control", "control_scale", "control_interval", "guess_mode", "detect", "control_mask")


class _Run(click.Command):
    """Refusals of a request speak of the options that were given, and a prompt that looks like one gets a hint."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        attached = any(re.match(r"-[no].", text) for text in args)  # read as -n or -o and its value
        try:
            return super().parse_args(ctx, args)
        except (click.NoSuchOption, click.MissingParameter) as error:
            if attached if isinstance(error, click.MissingParameter) else not error.possibilities:
                hint = "A prompt that begins with a dash comes last, after two dashes: run BUNDLE -- '-star'"
                raise click.UsageError(f"{error.format_message()} {hint}", ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        options = dict.fromkeys(("denoising_start", "denoising_end"), "--refine-from")
        options |= {str(param.name): max(param.opts, key=len) for param in self.params if "_" in str(param.name)}
        fields = re.compile(r"'[^']*'|\"[^\"]*\"|\b(" + "|".join(options) + r")\b")
        try:
            return super().invoke(ctx)
        except RequestError as error:
            text = fields.sub(lambda found: options[found[1]] if found[1] else found[0], str(error))
            raise RequestError(text) from None


@click.command("run", cls=_Run)
@click.argument("bundle", type=click.Path())
@click.argument("prompt")
@click.option("-n", "--negative", "--negative-prompt", "negative_prompt", help="What the image should not show.")
@click.option(
    "-o",
    "--output",
    default="out.png",
    type=click.Path(),
    help="PNG file to write; with --count NAME-0.png, NAME-1.png and so on.",
)
@click.option("--image", type=click.Path(), help="Start from this picture.")
@click.option(
    "--mask",
    "--mask-image",
    "mask",
    type=click.Path(),
    help="With --image: draw anew only where this picture is bright.",
)
@click.option(
    "--strength",
    type=float,
    help="With --image: how much of the schedule is run, above 0 to 1. [default: 0.8; 1 with --mask; 0.6 for SD3 and "
    "FLUX.1]",
)
@click.option(
    "--resize",
    default="default",
    type=click.Choice(["default", "fill", "crop"]),
    help="How --image comes to --width and --height: stretched, with borders, or cut.",
)
@click.option(
    "--padding-mask-crop",
    type=int,
    metavar="PIXELS",
    help="With --mask: draw only the part around the mask, at full size, and lay it over the picture.",
)
@click.option(
    "--control",
    multiple=True,
    metavar="NAME=PICTURE",
    help="Steer the drawing by a picture of edges, depth or the like, through this control of the bundle; of a "
    "ControlNet-Union, NAME:MODE=PICTURE. May be repeated.",
)
@click.option("--control-scale", multiple=True, metavar="NAME=SCALE", help="How much it adds. [default: 1]")
@click.option(
    "--control-interval",
    multiple=True,
    metavar="NAME=START:END",
    help="The part of the steps, from 0 to 1, in which it acts.",
)
@click.option(
    "--control-mask",
    multiple=True,
    metavar="NAME=PICTURE",
    help="Of a control that inpaints: white where its picture is left out, and drawn anew.",
)
@click.option("--guess-mode", is_flag=True, help="Controls act on the prompt's half alone, and less further out.")
@click.option(
    "--detect",
    multiple=True,
    metavar="NAME[=canny]",
    help="The picture of this control is a photograph: take the edges that cv2.Canny finds in it.",
)
@click.option(
    "--ip-image",
    multiple=True,
    metavar="[NAME=]PICTURE",
    help="A picture that is read beside the prompt, by an IP-Adapter of the bundle. May be repeated.",
)
@click.option(
    "--ip-embeds",
    multiple=True,
    metavar="[NAME=]FILE",
    help="In place of pictures what an image encoder, or a face model, made of them: a .npy file, (images, ...).",
)
@click.option("--ip-scale", multiple=True, metavar="[NAME=]SCALE", help="How much it adds. [default: 1]")
@click.option(
    "--ip-mask",
    multiple=True,
    metavar="[NAME=]PICTURE",
    help="White where the image acts; one for each --ip-image, in the same order. [default: everywhere]",
)
@click.option(
    "--ip-negative",
    multiple=True,
    metavar="[NAME=]PICTURE",
    help="A picture that the negative prompt's half of guidance reads. [default: as diffusers]",
)
@click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="FILE[=STRENGTH[:TEXT]]",
    help="A LoRA to draw with; TEXT is its strength in the text encoders. May be repeated.",
)
@click.option(
    "--embedding",
    "embeddings",
    multiple=True,
    metavar="FILE[=WORD]",
    help="A textual inversion: prompts may have its word. May be repeated.",
)
@click.option(
    "--lora-approximate",
    is_flag=True,
    help="As an input, bring a form that is no product of two factors to the nearest one; what is lost is told.",
)
@click.option("--lora-ignore-unused", is_flag=True, help="Leave out what of a LoRA changes nothing in this model.")
@click.option(
    "--scheduler",
    help="A name that `diffoundry schedulers` lists, or a diffusers class. [default: the checkpoint's own]",
)
@click.option(
    "--scheduler-option",
    "scheduler_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="As in a scheduler_config.json, or eta; a value is JSON (true, 0.5). May be repeated.",
)
@click.option(
    "--steps", "--num-inference-steps", "steps", type=int, help="Steps of the scheduler. [default: the bundle's]"
)
@click.option("--timesteps", type=NUMBERS, metavar="T,T,…", help="Timesteps of your own, in place of --steps.")
@click.option(
    "--sigmas",
    type=NUMBERS,
    metavar="S,S,…",
    help="Sigmas of your own, in place of --steps; for euler also the one after the last step.",
)
@click.option(
    "--guidance",
    "--guidance-scale",
    "guidance",
    type=float,
    help="1 or less turns guidance off. [default: the bundle's]",
)
@click.option(
    "--guidance-mode",
    default="joint",
    type=click.Choice(["joint", "split", "off"]),
    help="Both halves in one call, in two calls of half the memory, or none.",
)
@click.option(
    "--guidance-interval",
    nargs=2,
    type=float,
    metavar="START END",
    default=(0.0, 1.0),
    help="The part of the steps, from 0 to 1, that is guided.",
)
@click.option("--guidance-rescale", default=0.0, type=float, help="0 to 1, against overexposure (Lin 2023).")
@click.option(
    "--true-cfg-scale",
    default=1.0,
    type=float,
    help="FLUX.1: guidance by a negative prompt, beside the one that the model is given; 1 is none.",
)
@click.option(
    "--skip-guidance-layers",
    type=LAYERS,
    default=(),
    metavar="N,N,…",
    help="SD3.5: guidance by the difference to a prediction without these layers, such as 7,8,9. The first is 0.",
)
@click.option("--skip-layer-guidance-scale", type=float, default=2.8, help="How much of that difference is added.")
@click.option(
    "--skip-layer-guidance-start", type=float, default=0.01, help="The part of the steps, from 0 to 1, before it."
)
@click.option("--skip-layer-guidance-stop", type=float, default=0.2, help="The part of the steps at which it ends.")
@click.option("--forecast", is_flag=True, help="Call the model in 3 steps, then in every second: 12 calls for 20.")
@click.option("--weights", is_flag=True, help="The prompt holds weights: (a red star)1.3, ring++, heart-.")
@click.option("--windows", is_flag=True, help="A prompt that is too long takes several windows of the text encoder.")
@click.option("--clip-skip", type=int, metavar="LAYERS", help="Leave out the last layers of the text encoder.")
@click.option("--prompt-2", help="SDXL, SD3, FLUX.1: another prompt for the second text encoder.")
@click.option("--negative-2", "--negative-prompt-2", "negative_prompt_2", help="Another negative prompt for it.")
@click.option("--prompt-3", help="SD3: another prompt for the third text encoder.")
@click.option("--negative-3", "--negative-prompt-3", "negative_prompt_3", help="Another negative prompt for it.")
@click.option(
    "--max-sequence-length",
    type=click.IntRange(1, MOST_TOKENS),
    metavar="TOKENS",
    help="SD3, FLUX.1, Z-Image: of a prompt for T5 or Qwen3; fewer take less time. [default: 256, 512, 512]",
)
@click.option("--original-size", nargs=2, type=int, metavar="HEIGHT WIDTH", help="SDXL: size that the picture had.")
@click.option("--crop", nargs=2, type=int, metavar="TOP LEFT", help="SDXL: where it was cut.")
@click.option("--target-size", nargs=2, type=int, metavar="HEIGHT WIDTH", help="SDXL: size that it got.")
@click.option("--aesthetic-score", type=float, help="SDXL refiner: how good the picture is. [default: 6]")
@click.option(
    "--refiner",
    type=click.Path(),
    metavar="BUNDLE",
    help="SDXL: the bundle that runs the last steps; --clip-skip is for the first alone.",
)
@click.option("--refine-from", type=float, help="With --refiner: the part of the schedule before it. [default: 0.8]")
@click.option("--seed", type=int, help="Of the first image; image i has seed + i. [default: random]")
@click.option(
    "--rng",
    default="cpu",
    type=click.Choice(["cpu", "cuda"]),
    help="Whose noise the seed means: torch's generator on the CPU, or on an NVIDIA GPU.",
)
@click.option("--count", default=1, type=int, help="Number of images.")
@click.option("--batch", default=4, type=click.IntRange(1), help="Most images in one U-Net call.")
@click.option("--width", type=int, help="A multiple of 8, or 16. [default: the picture's, else the checkpoint's]")
@click.option("--height", type=int, help="A multiple of 8, or 16. [default: the picture's or the checkpoint's]")
@click.option(
    "--decoder",
    default="full",
    type=click.Choice(["full", "tiny"]),
    help="The checkpoint's own, or the small one that it was compiled with.",
)
@click.option("--tiled", is_flag=True, help="Encode and decode in tiles: the memory of one, however large the picture.")
@click.option("--preview", type=click.Path(), help="PNG file that shows the first image after each step.")
@engine_option()
@precision_option("Of the models. [default: what the bundle was compiled for; fp32 on the CPU]")
@click.option(
    "--weight-budget",
    type=GIB,
    help="Of plans that stream their weights: what stays on the GPU. [default: TensorRT's choice]",
)
@threads_option
@json_option
def run_command(
    bundle: str,
    output: str,
    batch: int,
    refiner: str | None,
    refine_from: float | None,
    preview: str | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Draw PROMPT with BUNDLE.

    The PNG records how it was made, in its text chunk `diffoundry`.
    """
    from .. import __version__
    from ..runtime.pictures.autoencoder import check_decoder
    from ..runtime.pictures.images import output_paths, save_png
    from ..runtime.pipeline import load
    from ..runtime.refine import generate_refined
    from .outputs import check_beside

    if refine_from is not None and refiner is None:
        raise click.UsageError("--refine-from goes with --refiner: give the refiner's bundle too, or leave it out")
    how = {name: asked.pop(name) for name in ("engine", "precision", "threads", "weight_budget")}
    loras = read_loras(asked.pop("loras"), asked.pop("lora_ignore_unused"), asked.pop("lora_approximate"))
    words = asked.pop("embeddings")
    request = _request(asked)
    paths = output_paths(Path(output), request.count)
    shown = None if preview is None else output_paths(Path(preview), 1)[0]
    if shown in paths:
        raise click.UsageError("--preview and --output are one file: give another name to one of them")
    pipeline = load(bundle, **how)
    check_beside(pipeline.bundle, [(path, "--output") for path in (*paths, *([] if shown is None else [shown]))])
    if shown is not None:
        check_decoder(pipeline.bundle, "tiny")
    if words:
        pipeline.set_embeddings(list(words))
    if loras:
        told = bool(request.control or request.image_prompt)  # which the denoiser that takes LoRAs is not
        pipeline.set_loras(loras, as_inputs=False if told else None)
    with progress("run", shown=not as_json) as report:

        def callback(step: int, total: int, latents: Any) -> None:
            report("step", step, total)
            if shown is not None:
                save_png(pipeline.preview(latents[:1])[0], shown, {"step": step, "steps": total})

        options: dict[str, Any] = {"batch": batch, "low_memory": True, "callback": callback}
        if refiner is None:
            result = pipeline.generate(request, **options)
        else:
            if refine_from is not None:
                options["part"] = refine_from
            result = generate_refined(pipeline, load(refiner, **how), request, **options)
    info = pipeline.info()
    made = {**result.request, "count": 1, "source": pipeline.bundle.manifest.source, "diffoundry": __version__}
    made |= {name: info[name] for name in ("engine", "precision")}
    for path, image, own in zip(paths, result.images, result.seeds, strict=True):
        save_png(image, path, made | {"seed": own})
    remedy = "" if pipeline.bundle.manifest.wiring.flow else " (--windows takes it in)"
    for name, text in result.truncated.items():
        left = "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST_SHOWN])
        more = f" … ({len(text)} letters)" if len(text) > _LONGEST_SHOWN else ""
        print(f"Warning: {name} is too long, this was left out: {left}{more}{remedy}", file=sys.stderr)
    if as_json:
        described = {
            "images": [{"path": str(path), "seed": own} for path, own in zip(paths, result.seeds, strict=True)],
            "request": result.request,
            **info,
            "truncated": result.truncated,
            "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
        }
        print(json.dumps(described))
    else:
        for path, own in zip(paths, result.seeds, strict=True):
            click.echo(f"{path} (seed {own})")


def _request(asked: dict[str, Any]) -> Any:
    """The request that the options make. Raises `RequestError` or `click.UsageError`."""
    from ..runtime.conditioning import Conditioning
    from ..runtime.loop.guidance import SKIPPING, Guidance
    from ..runtime.request import Request

    if asked["steps"] is not None and (asked["timesteps"] is not None or asked["sigmas"] is not None):
        raise click.UsageError("--timesteps and --sigmas take the place of --steps: leave --steps out")
    guided = ("guidance", "guidance_mode", "guidance_interval", "guidance_rescale", "true_cfg_scale", *SKIPPING)
    guidance = Guidance(*(asked.pop(name) for name in guided))
    sizes = {name: asked.pop(name) for name in ("original_size", "crop", "target_size", "aesthetic_score")}
    options = read_options(asked.pop("scheduler_options"))
    controls = read_controls(*(asked.pop(name) for name in _OF_CONTROLS))
    prompts = read_image_prompts(*(asked.pop(name) for name in _IP_OPTIONS))
    conditioning = Conditioning(**{name: value for name, value in sizes.items() if value is not None})
    more: dict[str, Any] = {
        "guidance": guidance,
        "conditioning": conditioning,
        "scheduler_options": options,
        "control": controls,
        "image_prompt": prompts,
    }
    return Request(**more, **asked)
