"""`diffoundry inspect`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from ..families.control import mode_names
from .options import json_option
from .streams import shown

_SHOWN = ("precision", "quality", "calibration")
"""The reports that the page on eight bits shows."""


@click.command("inspect")
@click.argument("bundle", type=click.Path())
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="Write what was measured in eight bits as a page with pictures, and do nothing else.",
)
@json_option
def inspect_command(bundle: str, page: Path | None, as_json: bool) -> None:
    """Show what BUNDLE holds and what was measured."""
    from ..bundle.manifest import to_json
    from ..common.errors import BundleError
    from ..common.files import read_json
    from ..engines import EngineStore
    from ..families import open_bundle

    opened = open_bundle(bundle)
    if page is not None:
        from ..calibration.eightbit.page import write
        from .outputs import check_beside, check_output

        if page.suffix.lower() not in (".html", ".htm"):
            raise click.UsageError(f"--report writes a page: give it a name that ends in .html, found {str(page)!r}")
        check_output(page, "--report")
        check_beside(opened, [(page, "--report")])
        opened.check({f"reports/{name}.json" for name in _SHOWN} & set(opened.manifest.files))
        write(opened, page)
        click.echo(page)
        return
    reports: dict[str, dict[str, Any]] = {}
    for name in ("parity", "precision", "quality", "fusion", "engines", "calibration", "text_storage"):
        path = f"reports/{name}.json"
        try:
            opened.check({path} & set(opened.manifest.files))
            if opened.path(path).exists():
                reports[name] = read_json(opened.path(path), f"the {name} report")
        except BundleError as error:
            click.echo(f"Warning: {shown(str(error))}", err=True)
    engines = EngineStore(opened.root / "engines").records()
    sizes = {
        name: sum(path.stat().st_size for path in opened.path(name).glob("*") if path.is_file())
        for name in opened.manifest.components
    }
    if as_json:
        described = {"bundle": str(opened.root), "bytes": sizes, **to_json(opened.manifest)}
        chosen = reports.pop("engines", {})
        print(json.dumps({**described, "parity": {}, **reports, "choice": chosen, "engines": engines}))
    else:
        _show(opened, sizes, reports, engines)


def _show(opened: Any, sizes: dict[str, int], reports: dict[str, Any], engines: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..bundle.wiring import SOURCES
    from ..calibration.choice import describe
    from ..runtime.schedule import Schedules

    manifest = opened.manifest

    class Page(Console):
        def print(self, *objects: Any, **how: Any) -> None:
            super().print(*(shown(each) if isinstance(each, str) else each for each in objects), **how)

    console = Page(highlight=False, markup=False)
    source = manifest.source.get("name", "an ONNX folder without a manifest")
    if opened.foreign:
        console.print("there is no bundle.json: nothing in this folder is checked when it is run")
    console.print(
        f"{opened.root}: {manifest.family} from {source}, {manifest.precision} for {manifest.engine}, "
        f"{', '.join(manifest.tasks)}"
    )
    latents = manifest.latents
    console.print(
        f"default size {manifest.default_width}x{manifest.default_height}, any multiple of {latents.unit}; "
        f"{latents.channels} latent channels, scaling factor {latents.scaling_factor:g}; "
        f"default {manifest.default_steps} steps, guidance {manifest.default_guidance:g}"
    )
    for name, source in manifest.wiring.inputs.items():
        console.print(f"{manifest.named('denoiser')}.{name}: {SOURCES.get(source, source)}")
    table = Table("component", "size", "largest error to torch")
    models = {name: part for name, part in manifest.components.items() if part.role != "step"}
    for name in models:
        table.add_row(
            *(Text(shown(cell)) for cell in (name, _size(sizes[name]), _worst(reports.get("parity", {}).get(name))))
        )
    console.print(table)
    for name, component in models.items():
        for arrow, tensors in (("<-", component.inputs), ("->", component.outputs)):
            for names, tensor in _grouped(tensors):
                shape = ", ".join(str(axis) for axis in tensor.shape)
                console.print(f"{name} {arrow} {names} {tensor.dtype}[{shape}]", soft_wrap=True)
    for name, control in manifest.wiring.controls.items():
        kind = {"controlnet": "a ControlNet", "union": "a ControlNet-Union", "adapter": "a T2I-Adapter"}[control.kind]
        mode, modes = (":MODE", f" of {', '.join(mode_names(control))}") if control.modes else ("", "")
        mask = f" --control-mask {name}=PICTURE" if control.masked else ""
        console.print(f"--control {name}{mode}=PICTURE{mask}: {kind}{modes}, {control.component}", soft_wrap=True)
    for name, lora in manifest.wiring.lora_inputs.items():
        console.print(
            f"--lora FILE: {name} takes LoRAs as inputs, of rank {lora.rank} in all, in {len(lora.weights)} layers",
            soft_wrap=True,
        )
    for name, prompt in manifest.wiring.image_prompts.items():
        given = f"--ip-image {name}=PICTURE" if prompt.encoder else f"--ip-embeds {name}=FILE"
        console.print(f"{given}: an IP-Adapter, {prompt.component}", soft_wrap=True)
    for name, counts in Schedules(opened).traced.items():
        console.print(f"scheduler {name}: read off its code for {', '.join(map(str, sorted(counts)))} steps")
    for line in _precision_lines(reports):
        console.print(line, soft_wrap=True)
    for line in _storage_lines(reports, manifest):
        console.print(line, soft_wrap=True)
    for line in _fusion_lines(reports, manifest):
        console.print(line, soft_wrap=True)
    if reports.get("engines"):
        console.print(describe(reports["engines"]), soft_wrap=True)
    for record in engines:
        line = _plan_line(record) if isinstance(record.get("profile"), dict) else _session_line(record)
        console.print(f"engines/{record['key']}: {line}", soft_wrap=True)
    if manifest.versions:
        console.print("built with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))


def _precision_lines(reports: dict[str, Any]) -> Iterator[str]:
    """How far each lower precision is from fp32, and how much of each component stays in fp32."""
    from ..bundle import EIGHT_BIT
    from ..bundle.reports import is_quality, is_report
    from ..calibration.eightbit.controlled import CONTROLLED, under_controls
    from ..calibration.eightbit.times import describe, warnings

    for precision, components in reports.get("precision", {}).items():
        quality = reports.get("quality", {}).get(precision, {})
        kept = []
        for name, report in components.items() if isinstance(components, dict) else ():
            if is_report(report):
                counts = report["nodes"]
                kept.append(f"{name} {counts['kept']} of {counts['kept'] + counts['low']}")
        distance = f"images {quality['psnr_db']:.1f} dB from fp32" if is_quality(quality) else "not measured"
        yield f"{precision}: {distance}; nodes that stay in fp32: {', '.join(kept) or 'not recorded'}"
        if isinstance(quality, dict) and quality.get(CONTROLLED):
            yield f"{precision}: {under_controls(quality[CONTROLLED])}"
    for key, quality in reports.get("quality", {}).items():
        if "/" in key and is_quality(quality):
            names = quality.get("lower")
            lower = ", ".join(map(str, names)) if isinstance(names, list) else "not recorded"
            what = "beside it in bf16" if key.partition("/")[0] in EIGHT_BIT else "computed in it"
            yield f"{key.replace('/', ' on ')}: images {quality['psnr_db']:.1f} dB from fp32; {what}: {lower}"
    for key, report in reports.get("calibration", {}).items():
        yield describe(key, report)
        yield from (f"Warning: {line}" for line in warnings(report))


def _storage_lines(reports: dict[str, Any], manifest: Any) -> Iterator[str]:
    """What text encoders with weights in eight bits change."""
    from ..bundle.reports import is_quality
    from ..calibration.text_storage import INT8, describe

    report = reports.get("text_storage", {}).get(INT8)
    if is_quality(report) and any(part.storage for part in manifest.components.values()):
        yield describe(report)


def _has(manifest: Any, component: str, variant: str) -> bool:
    return component in manifest.components and variant in manifest.components[component].variants


def _fusion_lines(reports: dict[str, Any], manifest: Any) -> Iterator[str]:
    """Of graphs made for an engine, how many nodes each has and had, and how far it is from torch."""
    from ..bundle.reports import is_fusion

    for name, components in reports.get("fusion", {}).items():
        parts = []
        for component, report in components.items() if isinstance(components, dict) else ():
            if is_fusion(report) and _has(manifest, component, name):
                before, after = (sum(report["operators"][when].values()) for when in ("before", "after"))
                parts.append(f"{component} {after} nodes of {before}, error to torch {report['max_abs_error']:.1e}")
        if parts:
            yield f"{name}: {'; '.join(parts)}"


def _plan_line(record: dict[str, Any]) -> str:
    """What a plan is for, how big it is, what it is made of, and what it took to build it."""
    from ..bundle.reader import fits
    from ..engines.tensorrt.plan import Measured

    if not fits(Measured, record):
        return "its record is damaged; compile the bundle again"
    made, memory, peak = record["made_of"], record["memory"], record["peak_bytes"]
    layers = ", ".join(f"{count} {precision}" for precision, count in made["layers"].items())
    attention = made["attention"]
    fused = f"; attention fused {attention['fused']} of {attention['of']}" if attention["of"] else ""
    archs = record.get("archs")
    place = record.get("device") or ", ".join(map(str, archs if isinstance(archs, list) else ()))
    flags = "".join(f", {flag}" for flag in record.get("flags") or ())
    weights = _size(memory["weights"]) if memory.get("weights") else "none"
    return (
        f"{record.get('component')} {record.get('precision')}, "
        f"{record['profile'].get('name')}{flags}, for {place} ({record.get('backend')} {record.get('version')}); "
        f"{_size(record['bytes'])}, weights {weights}; layers: {layers}{fused}; "
        f"built in {record['seconds']:.0f} s" + (f" with {peak / 2**30:.1f} GiB" if peak else "")
    )


def _session_line(record: dict[str, Any]) -> str:
    """What a compiled model is of, and how big it is."""
    names = ("component", "backend", "version", "provider", "precision", "shapes", "device")
    made = " ".join(str(record[name])[:64] for name in names if name in record)
    return f"{made}, {_size(record['bytes'])}"


def _grouped(tensors: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Each tensor with its name; of a numbered series of one shape, the first with the names of both ends."""
    for (series, _, _), group in itertools.groupby(
        tensors, lambda tensor: (tensor.name.rstrip("0123456789"), tensor.dtype, tensor.shape)
    ):
        members = list(group)
        first, last = members[0], members[-1]
        numbered = series.endswith(".") and len(members) > 1
        yield (f"{first.name} … {last.name}" if numbered else first.name), first
        if not numbered:
            yield from ((other.name, other) for other in members[1:])


def _worst(part: Any) -> str:
    try:
        worst = f"{max(float(case['max_abs_error']) for case in part['cases']):.1e}"
        return f"{worst} (twin)" if part.get("twin") else worst
    except (TypeError, ValueError, LookupError, AttributeError):
        return "not measured"


def _size(count: int) -> str:
    if not count:
        return "missing"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
