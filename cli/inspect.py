"""`diffoundry inspect`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import click


@click.command("inspect")
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def inspect_command(bundle: str, as_json: bool) -> None:
    """Show what BUNDLE holds and what was measured."""
    from ..bundle import Bundle, BundleError
    from ..bundle.files import read_json
    from ..bundle.manifest import to_json
    from ..engines import EngineStore

    opened = Bundle.open(bundle)
    parity: dict[str, Any] = {}
    with suppress(BundleError):
        opened.check({"reports/parity.json"} & set(opened.manifest.files))
        parity = read_json(opened.root / "reports" / "parity.json", "the parity report")
    engines = EngineStore(opened.root / "engines").records()
    sizes = {
        name: sum(path.stat().st_size for path in opened.path(part.model).parent.glob("*") if path.is_file())
        if opened.path(part.model).is_file()
        else 0
        for name, part in opened.manifest.components.items()
    }
    if as_json:
        described = {"bundle": str(opened.root), "bytes": sizes, **to_json(opened.manifest)}
        print(json.dumps({**described, "parity": parity, "engines": engines}))
    else:
        _show(opened, sizes, parity, engines)


def _show(opened: Any, sizes: dict[str, int], parity: dict[str, Any], engines: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..runtime.schedules import Schedules

    manifest = opened.manifest
    console = Console(highlight=False, markup=False)
    source = manifest.source.get("name", "an ONNX folder without a manifest")
    if opened.foreign:
        console.print("there is no bundle.json: nothing in this folder is checked when it is run")
    console.print(f"{opened.root}: {manifest.family} from {source}, {manifest.precision}, {', '.join(manifest.tasks)}")
    latents = manifest.latents
    console.print(
        f"default size {manifest.default_width}x{manifest.default_height}, any multiple of {latents.downscale}; "
        f"{latents.channels} latent channels, scaling factor {latents.scaling_factor:g}; "
        f"default {manifest.default_steps} steps, guidance {manifest.default_guidance:g}"
    )
    told = [name for name, value in manifest.options.items() if value]
    if told:
        console.print(", ".join(told))
    table = Table("component", "size", "largest error to torch")
    shown = {name: part for name, part in manifest.components.items() if name != "step"}  # the same in every bundle
    for name in shown:
        table.add_row(*(Text(cell) for cell in (name, _size(sizes[name]), _worst(parity.get(name)))))
    console.print(table)
    for name, component in shown.items():
        for arrow, tensors in (("<-", component.inputs), ("->", component.outputs)):
            for names, tensor in _grouped(tensors):
                shape = ", ".join(str(axis) for axis in tensor.shape)
                console.print(f"{name} {arrow} {names} {tensor.dtype}[{shape}]", soft_wrap=True)
    traced = Schedules(opened).traced
    for name, counts in traced.items():
        console.print(f"scheduler {name}: read off its code for {', '.join(map(str, sorted(counts)))} steps")
    for record in engines:
        made = " ".join(str(record.get(name, "?"))[:32] for name in ("component", "backend", "version", "provider"))
        console.print(f"engines/{str(record.get('key'))[:32]}: {made}, {_size(record['bytes'])}", soft_wrap=True)
    if manifest.versions:
        console.print("built with " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))


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
        return f"{max(float(case['max_abs_error']) for case in part['cases']):.1e}"
    except (TypeError, ValueError, LookupError):
        return "not measured"


def _size(count: int) -> str:
    if not count:
        return "missing"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
