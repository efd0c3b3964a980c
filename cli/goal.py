"""What `compile` and `build` share: the options of plans and of the calibration run, and what both show at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.errors import DiffoundryError
from .options import GIB, NAMES, F, Parsed

if TYPE_CHECKING:
    from ..bundle import Bundle

Size = tuple[int, int]
_LARGEST_PROMPTS = 1 << 20
_FLAGS = {
    "refit": "TensorRT: plans whose weights can be replaced; needs the GPU.",
    "strip": "TensorRT: plans without weights, filled from the ONNX; needs the GPU.",
    "weight-streaming": "TensorRT: weights may stay in the memory of the host.",
    "version-compatible": "tensorrt: plans that later versions load.",
    "hardware-compatible": "tensorrt: plans for all GPUs from Ampere on.",
}


def parse_size(text: str) -> Size:
    """Read `512x768`, width and height. Raises `DiffoundryError`."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip())
    if found is None:
        raise DiffoundryError(f"a shape is WIDTHxHEIGHT, such as 512x768, found {text!r}")
    return int(found[1]), int(found[2])


def parse_range(text: str) -> tuple[Size, Size]:
    """Read `256x256-1024x1024`. Raises `DiffoundryError`."""
    low, dash, high = text.partition("-")
    if not dash:
        raise DiffoundryError(f"dynamic sizes are MIN-MAX, such as 256x256-1024x1024, found {text!r}")
    return parse_size(low), parse_size(high)


def parse_batch(text: str) -> tuple[int, int]:
    """Read `4` or `1-4`. Raises `DiffoundryError`."""
    return _parse_numbers(text, "a batch is a number or a range, such as 4 or 1-4")


def parse_tokens(text: str) -> tuple[int, int]:
    """Read `256` or `64-512`. Raises `DiffoundryError`."""
    return _parse_numbers(text, "tokens are a number or a range, such as 256 or 64-512")


def _parse_numbers(text: str, what: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text.strip())
    if found is None:
        raise DiffoundryError(f"{what}, found {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _sizes(text: str) -> list[Size]:
    return [parse_size(part) for part in NAMES.convert(text, None, None)]


def _budget(text: str) -> Any:
    from ..calibration import Budget

    return Budget.parse(text)


_OPTIONS = (
    click.option(
        "--arch",
        "archs",
        multiple=True,
        type=NAMES,
        metavar="ARCH,…",
        help="tensorrt-rtx: the GPUs to build for: sm75, sm80, sm86, sm89, sm120, sm121. [default: the GPU here]",
    ),
    click.option(
        "--shape",
        "shapes",
        multiple=True,
        type=Parsed("WxH,…", _sizes),
        help="TensorRT: sizes of pictures, a static plan for each. [default: the checkpoint's]",
    ),
    click.option(
        "--dynamic",
        type=Parsed("WxH-WxH", parse_range),
        help="TensorRT: one more plan for all sizes between two; slower than static ones.",
    ),
    click.option(
        "--batch", type=Parsed("N[-M]", parse_batch), help="TensorRT: images in one call of the U-Net. [default: 1]"
    ),
    click.option(
        "--tokens",
        type=Parsed("N[-M]", parse_tokens),
        help="TensorRT: the --max-sequence-length that `run` may ask for. [default: the checkpoint's alone]",
    ),
    *(click.option(f"--{name}", is_flag=True, help=text) for name, text in _FLAGS.items()),
    click.option("--build-memory", type=GIB, help="TensorRT: stop a builder that takes more than this."),
    click.option(
        "--scan-prompts", type=click.Path(), metavar="FILE", help="Under fp32: prompts of the scan, one a line."
    ),
    click.option("--scan-steps", type=int, metavar="N", help="Under fp32: steps of the scan. [default: the bundle's]"),
    click.option(
        "--scan-size",
        type=Parsed("WxH", parse_size),
        help="Under fp32: size of its pictures. [default: the checkpoint's]",
    ),
    click.option(
        "--min-psnr",
        type=float,
        metavar="DB",
        help="Under fp32: how near to fp32's the median picture of the scan must be. [default: 35; int8, fp8: 25]",
    ),
    click.option(
        "--budget",
        type=Parsed("MEASURE=LEAST", _budget),
        help="Under fp32, in place of --min-psnr: ssim=0.9 (extra quality), or module:function=NUMBER, a function of "
        "(images, exact, prompts) of your own.",
    ),
    click.option(
        "--calibration",
        type=click.Path(),
        metavar="FILE",
        help="int8, fp8: statistics of the same model, such as the int8.statistics.npz of another bundle.",
    ),
    click.option(
        "--lora-rank",
        type=int,
        metavar="R",
        help="Make a denoiser that takes LoRAs of up to this rank in all as inputs, so that they change at no cost, "
        "and each picture of a batch has its own; 0: remove it.",
    ),
    click.option(
        "--lora-layers",
        type=click.Choice(["attention", "transformer", "all"]),
        help="With --lora-rank: the layers that take them. [default: all for the processor; for GPUs "
        "transformer, what most trainers train]",
    ),
    click.option(
        "--text-storage-dtype",
        type=click.Choice(["int8"]),
        help="SD3, FLUX.1: weights of T5 in eight bits in the place of its own, for half the disk of bf16; it computes "
        "in floats. Pictures of the scan are held against those before.",
    ),
    click.option("--force", is_flag=True, help="int8: also where it is not faster on this machine."),
)


def goal_options(command: F) -> F:
    """The options of plans and of the calibration run; `take_goal` reads their values."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def take_goal(options: dict[str, Any]) -> dict[str, Any]:
    """Take the values of `goal_options` out of `options`; the `target` and the `scan`, None where nothing is said."""
    from ..calibration import Scan
    from ..engines.tensorrt.target import Target

    archs, shapes, path = options.pop("archs"), options.pop("shapes"), options.pop("scan_prompts")
    target: dict[str, Any] = {
        "archs": tuple(arch for part in archs for arch in part),
        "sizes": tuple(size for part in shapes for size in part),
        "dynamic": options.pop("dynamic"),
        "batch": options.pop("batch"),
        "tokens": options.pop("tokens"),
        "flags": tuple(name for name in _FLAGS if options.pop(name.replace("-", "_"))),
        "memory_limit": options.pop("build_memory"),
    }
    scan: dict[str, Any] = {
        "prompts": None if path is None else _prompts(path),
        "steps": options.pop("scan_steps"),
        "size": options.pop("scan_size"),
        "budget_db": options.pop("min_psnr"),
        "budget": options.pop("budget"),
    }
    more = {
        name: options.pop(name) for name in ("calibration", "force", "lora_rank", "lora_layers", "text_storage_dtype")
    }
    return {"target": _said(Target, target), "scan": _said(Scan, scan), **more}


def _said(kind: Callable[..., Any], values: dict[str, Any]) -> Any:
    """A `kind` of the values that were given, None where none was."""
    given = {name: value for name, value in values.items() if value not in (None, ())}
    return kind(**given) if given else None


def _prompts(path: str) -> tuple[str, ...]:
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > _LARGEST_PROMPTS:
            raise OSError(f"it is no file of up to {_LARGEST_PROMPTS >> 10} KiB")
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DiffoundryError(f"the prompts of the scan cannot be read from {path}: {error}") from None
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise DiffoundryError(f"{path} holds no prompt for the scan: write one a line")
    return prompts


def show_result(bundle: Bundle, ready: str, as_json: bool, **more: Any) -> None:
    """Print warnings and `ready`, or with `--json` the bundle, what was measured, and `more`."""
    from ..bundle.reports import read_report
    from ..calibration import text_storage
    from ..calibration.choice import describe
    from ..calibration.eightbit.times import describe as describe_times
    from ..engines.names import EngineName
    from ..engines.tensorrt.backend import BACKENDS

    precision, engine = bundle.manifest.precision, EngineName.parse(bundle.manifest.engine)
    qualities = read_report(bundle, "quality")
    quality = qualities.get(f"{precision}/{engine.backend}", qualities.get(precision))
    choice = read_report(bundle, "engines")
    has_plans = engine.backend in BACKENDS
    plans = read_report(bundle, "plans") if has_plans else {}
    fusion = read_report(bundle, "fusion").get(f"{bundle.manifest.precision}/{bundle.manifest.engine}")
    stored = read_report(bundle, text_storage.REPORT).get(text_storage.INT8)
    timed = read_report(bundle, "calibration").get(f"{precision}/{engine.backend}")
    for line in (*plans.get("warnings", []), *(timed or {}).get("warnings", [])):
        click.echo(f"Warning: {line}", err=True)
    if as_json:
        measured = {"quality": quality, "plans": plans, "fusion": fusion, "engines": choice, "calibration": timed}
        measured |= {"text_storage": stored}
        print(json.dumps({"bundle": str(bundle.root), **more, **{key: each for key, each in measured.items() if each}}))
    else:
        click.echo(ready)
        if choice and (choice.get("engine"), choice.get("precision")) == (str(engine), precision):
            click.echo(describe(choice))
        if stored:
            click.echo(text_storage.describe(stored))
        if timed:
            click.echo(describe_times(f"{precision}/{engine.backend}", timed))
