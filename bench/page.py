"""`bench --html`: a report as one page that needs no network and no scripts, for a browser or for paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.files import replacing
from ..common.markup import Markup, document, tag
from . import units
from .charts import spread_chart, stages_chart
from .report import OURS, Report
from .sections import Section, failures, sections

_SHORT = 24
"""Characters of a cell that stay in one line."""


def write(report: Report, path: Path) -> None:
    """Write the page of a report beside `path` and rename it into place. Raises `OSError`."""
    with replacing(path) as beside:
        beside.write_text(html(report), encoding="utf-8")


def html(report: Report) -> str:
    """The page of a report."""
    title = units.heading(report)
    return document(title, *_body(report, title))


def _body(report: Report, title: str) -> list[Markup]:
    parts = [tag("h1", title), tag("p", f"{units.machine(report)}; {units.plain(report.date, 40)}", class_="soft")]
    if not report.complete:
        parts.append(tag("p", "The run was interrupted: this is what was measured until then.", class_="bad"))
    first, *others = sections(report) or (None,)
    parts += [_section(first, report)] if first else []
    parts += [tag("p", tag("b", f"{name} failed: "), why, class_="bad") for name, why in failures(report)]
    if any(system.turns for system in report.systems):
        parts.append(tag("section", tag("h2", "Charts"), stages_chart(report), spread_chart(report)))
    parts += [_section(section, report) for section in others if section]
    if report.notes:
        parts.append(tag("section", tag("h2", "Notes"), *(tag("p", units.plain(note, 600)) for note in report.notes)))
    parts += [
        _list("Request", _request(report)),
        _list("Machine", _machine(report)),
        _list("Versions", _versions(report)),
    ]
    parts.append(tag("section", tag("h2", "Again"), tag("pre", tag("code", report.command))))
    return parts


def _section(section: Section, report: Report) -> Markup:
    ours = {units.marked(system) for system in report.systems if system.name == OURS}
    header = tag("tr", *(tag("th", text, scope="col") for text in section.header))
    rows = (
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", cell, class_="short" if len(cell) <= _SHORT else "") for cell in cells),
            class_="ours" if name in ours else "",
        )
        for name, *cells in section.rows
    )
    table = tag("div", tag("table", tag("thead", header), tag("tbody", *rows)), class_="wide")
    note = [tag("p", section.note, class_="soft")] if section.note else []
    return tag("section", tag("h2", section.title), table, *note)


def _list(title: str, values: Mapping[str, object]) -> Markup:
    rows = (
        tag("tr", tag("th", units.plain(key, 60), scope="row"), tag("td", units.plain(value, 400)))
        for key, value in values.items()
        if value not in (None, "")
    )
    return tag("section", tag("h2", title), tag("table", tag("tbody", *rows), class_="list"))


def _request(report: Report) -> dict[str, object]:
    request, bundle = report.request, report.bundle
    return {
        "bundle": f"{bundle.name}, {bundle.family}, compiled from {bundle.source}",
        "SHA-256 of its manifest": bundle.sha256,
        "prompt": request.prompt,
        "negative prompt": request.negative_prompt,
        "size": f"{request.width}×{request.height}",
        "steps": request.steps,
        "guidance": f"{request.guidance:g}",
        "scheduler": request.scheduler or "the checkpoint's",
        "seed": request.seed,
        "pictures in a turn": request.count,
        "engine": request.engine,
        "precision": request.precision,
        "threads": request.threads,
        "scenario": request.scenario,
    }


def _machine(report: Report) -> dict[str, object]:
    machine = report.machine
    clock = machine.clock_mhz
    speeds = [(clock.now, "when the run began"), (clock.max, "at most")] if clock else []
    return {
        "processor": machine.processor,
        "cores": machine.cores,
        "instruction sets": ", ".join(machine.instruction_sets),
        "clock": ", ".join(f"{speed:,.0f} MHz {when}" for speed, when in speeds if speed is not None),
        "memory": None if machine.memory_bytes is None else units.size(machine.memory_bytes),
        "GPU": f"{machine.gpu.name}, {units.size(machine.gpu.memory_bytes)}" if machine.gpu else None,
        "load when the run began": None if machine.load is None else f"{machine.load:.1f}",
        "system": machine.system,
        "Python": machine.python,
    }


def _versions(report: Report) -> dict[str, object]:
    found = {"of this process": _listed(report.machine.versions)}
    for system in report.systems:
        told = [_listed(system.versions), _listed({key: _text(value) for key, value in system.info.items()})]
        found[units.plain(system.title or system.name)] = "; ".join(text for text in told if text)
    return dict(found)


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
