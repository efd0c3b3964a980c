"""`bench --html`: a report as one page that needs no network and no scripts, for a browser or for paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..common.files import replacing
from . import units
from .charts import spread_chart, stages_chart
from .markup import Markup, tag
from .report import OURS, Report
from .sections import Section, failures, sections

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_SHORT = 24
"""Characters of a cell that stay in one line."""
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5c6370; --paper: #fff; --line: #d5d9e0; --band: #f4f6f9;
  --bad: #a40000; --before: #ddaa33; --first_step: #bb5566; --steps: #004488; --after: #77ccee; --merged: #b9bcc2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a7b4; --paper: #16181c; --line: #3a3f48;
  --band: #1f2228; --bad: #ff8f8f; --steps: #5a9bd8; --after: #a5e0f5; --first_step: #d4717f; --merged: #6d7280; } }
* { box-sizing: border-box; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
body { margin: 0 auto; padding: 1.5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; line-height: 1.25; margin: 0 0 .3em; } h2 { font-size: 1.1em; margin: 2em 0 .5em; }
p { margin: .4em 0; } .soft, figcaption { color: var(--soft); font-size: .9em; } .bad { color: var(--bad); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .85em; }
th, td { padding: .35em .45em; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal;
  font-variant-numeric: tabular-nums; } thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th:first-child { text-align: left; min-width: 12em; overflow-wrap: anywhere; } tbody th { font-weight: 400; }
.ours > * { font-weight: 600; background: var(--band); }
.short { white-space: nowrap; } .list td { text-align: left; overflow-wrap: anywhere; }
pre { background: var(--band); border: 1px solid var(--line); padding: .7em 1em;
  white-space: pre-wrap; font-size: .9em; }
figure { margin: 1em 0 1.5em; overflow-x: auto; }
svg { width: 100%; min-width: 34rem; height: auto; font: 12px system-ui, sans-serif; fill: var(--ink); }
.part { stroke: var(--paper); stroke-width: 1; }
.before { fill: var(--before); } .first_step { fill: var(--first_step); }
.steps { fill: var(--steps); } .after { fill: var(--after); } .merged { fill: var(--merged); }
.end { text-anchor: end; } .middle { text-anchor: middle; } .axis { stroke: var(--line); }
.whisker { stroke: var(--steps); } .box { fill: var(--band); stroke: var(--steps); }
.turn { fill: var(--steps); opacity: .7; }
.far { fill: var(--bad); }
@media print { :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #fff;
  --bad: #a40000; --steps: #004488; --after: #77ccee; --first_step: #bb5566; --merged: #b9bcc2; }
  body { padding: 0; font-size: 10px; } th, td { padding: .25em .4em; } th:first-child { min-width: 9em; }
  h2 { break-after: avoid; } figure, tr, pre { break-inside: avoid; } .wide, figure { overflow: visible; }
  svg { min-width: 0; } @page { margin: 12mm; } }
"""


def write(report: Report, path: Path) -> None:
    """Write the page of a report beside `path` and rename it into place. Raises `OSError`."""
    with replacing(path) as beside:
        beside.write_text(html(report), encoding="utf-8")


def html(report: Report) -> str:
    """The page of a report."""
    title = units.heading(report)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', *_body(report, title)), lang='en')}\n"


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
