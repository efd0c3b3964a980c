"""`diffoundry compile`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import read_counts, read_gib, read_list, read_pairs
from .progress import progress

if TYPE_CHECKING:
    from ..calibration import Scan
    from ..export.target import Target


_LARGEST_PROMPTS = 1 << 20


@click.command("compile")
@click.argument("checkpoint")
@click.option("-o", "--output", required=True, type=click.Path(), help="The bundle folder to make.")
@click.option(
    "--engine",
    default="onnxruntime",
    show_default=True,
    metavar="ENGINE",
    help="What runs the models: onnxruntime, onnxruntime:cuda, onnxruntime:tensorrt, tensorrt, tensorrt-rtx.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of weights and activations. What the lower ones would spoil stays in fp32.",
)
@click.option(
    "--arch",
    "archs",
    multiple=True,
    metavar="ARCH,…",
    help="tensorrt-rtx: the GPUs to build for: sm75, sm80, sm86, sm89, sm120, sm121. [default: the GPU that is here]",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="WxH,…",
    help="TensorRT: sizes of pictures, a static plan for each. [default: the checkpoint's]",
)
@click.option(
    "--dynamic", metavar="WxH-WxH", help="TensorRT: one more plan for all sizes between two; slower than static ones."
)
@click.option("--batch", metavar="N[-M]", help="TensorRT: images in one call of the U-Net. [default: 1]")
@click.option("--refit", is_flag=True, help="TensorRT: plans whose weights can be replaced; needs the GPU.")
@click.option("--strip", is_flag=True, help="TensorRT: plans without weights, filled from the ONNX; needs the GPU.")
@click.option("--weight-streaming", is_flag=True, help="TensorRT: weights may stay in the memory of the host.")
@click.option("--version-compatible", is_flag=True, help="tensorrt: plans that later versions load.")
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: plans for all GPUs from Ampere on.")
@click.option("--build-memory", type=float, metavar="GIB", help="TensorRT: stop a builder that takes more than this.")
@click.option("--scan-prompts", type=click.Path(), metavar="FILE", help="fp16, bf16: prompts of the scan, one a line.")
@click.option("--scan-steps", type=int, metavar="N", help="fp16, bf16: steps of the scan. [default: the bundle's]")
@click.option("--scan-size", metavar="WxH", help="fp16, bf16: size of its pictures. [default: the checkpoint's]")
@click.option(
    "--min-psnr",
    type=float,
    metavar="DB",
    help="fp16, bf16: how near to fp32's the median picture of the scan must be. [default: 35]",
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
    precision: str,
    archs: tuple[str, ...],
    shapes: tuple[str, ...],
    dynamic: str | None,
    batch: str | None,
    build_memory: float | None,
    scan_prompts: str | None,
    scan_steps: int | None,
    scan_size: str | None,
    min_psnr: float | None,
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
    **flags: bool,
) -> None:
    """Compile CHECKPOINT into a bundle.

    CHECKPOINT is a folder in the diffusers layout, a single file (.safetensors, .ckpt) in the layout of the original
    authors, or a hub id (owner/name) when online. Each component is traced to
    ONNX, held against torch on three random shapes, and built for this machine. A compile that was stopped goes on
    where it was; a finished stage is not done twice.
    """
    from ..common.errors import DiffoundryError
    from ..export import compile
    from ..runtime.schedule import Schedules

    if ":" in (trace_scheduler or ""):
        sys.path.insert(0, str(Path.cwd()))  # a module of one's own lies where one stands
    with progress("compile", shown=not as_json) as report:
        bundle = compile(
            checkpoint,
            output,
            engine=engine,
            precision=precision,
            target=_target(archs, shapes, dynamic, batch, flags, build_memory),
            scan=_scan(scan_prompts, scan_steps, scan_size, min_psnr),
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
    quality, plans = _quality(bundle.root, precision), _plans(bundle.root)
    for line in plans.get("warnings", []):
        click.echo(f"Warning: {line}", err=True)
    if as_json:
        told = {"bundle": str(bundle.root), "max_abs_error": worst}
        print(json.dumps({**told, **({"quality": quality} if quality else {}), **({"plans": plans} if plans else {})}))
    else:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        click.echo(f"{output} is ready. Largest difference to torch: {errors}")
        try:
            Schedules(bundle).named(None)
        except DiffoundryError as error:
            click.echo(f"Note: {error}", err=True)


def _target(
    archs: tuple[str, ...],
    shapes: tuple[str, ...],
    dynamic: str | None,
    batch: str | None,
    flags: dict[str, bool],
    build_memory: float | None,
) -> Target | None:
    """What plans are built for; None when nothing was said of them."""
    from ..export.target import Target, parse_batch, parse_range, parse_size

    chosen = tuple(name.replace("_", "-") for name, on in flags.items() if on)
    said = (*archs, *shapes, *filter(None, chosen), dynamic, batch, build_memory)
    if all(value is None for value in said):
        return None
    for name, texts in (("--arch", archs), ("--shape", shapes)):
        if texts and not read_list(texts):
            raise click.UsageError(f"{name} names nothing: leave it out, or name one")
    return Target(
        archs=tuple(read_list(archs)),
        sizes=tuple(parse_size(text) for text in read_list(shapes)),
        dynamic=None if dynamic is None else parse_range(dynamic),
        batch=(1, 1) if batch is None else parse_batch(batch),
        flags=chosen,
        memory_limit=None if build_memory is None else read_gib("--build-memory", build_memory),
    )


def _scan(prompts: str | None, steps: int | None, size: str | None, min_psnr: float | None) -> Scan | None:
    """What the loop is run with to find what stays in fp32; None when nothing was said of it."""
    from ..calibration import Scan
    from ..common.errors import DiffoundryError
    from ..export.target import parse_size

    told: dict[str, Any] = {}
    if prompts is not None:
        try:
            if not Path(prompts).is_file() or Path(prompts).stat().st_size > _LARGEST_PROMPTS:
                raise OSError(f"it is no file of up to {_LARGEST_PROMPTS >> 10} KiB")
            text = Path(prompts).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DiffoundryError(f"the prompts of the scan cannot be read from {prompts}: {error}") from None
        told["prompts"] = tuple(line.strip() for line in text.splitlines() if line.strip())
        if not told["prompts"]:
            raise DiffoundryError(f"{prompts} holds no prompt for the scan: write one a line")
    if steps is not None:
        told["steps"] = steps
    if size is not None:
        told["size"] = parse_size(size)
    if min_psnr is not None:
        told["budget_db"] = min_psnr
    return Scan(**told) if told else None


def _plans(root: Path) -> dict[str, Any]:
    from ..common.files import read_json

    path = root / "reports" / "plans.json"
    return read_json(path, "the report on plans") if path.is_file() else {}


def _quality(root: Path, precision: str) -> dict[str, Any]:
    from ..common.files import read_json

    path = root / "reports" / "quality.json"
    found: dict[str, Any] = read_json(path, "the quality report").get(precision, {}) if path.is_file() else {}
    return found


def _worst_error(root: Path) -> dict[str, float]:
    from ..common.files import read_json

    parity = read_json(root / "reports" / "parity.json", "the parity report")
    return {
        name: max(case["max_abs_error"] for case in part["cases"]) for name, part in parity.items() if name != "step"
    }
