"""Write docs/benchmarks.md from the reports of `diffoundry bench`, and from the figures that are kept by hand.

python -m diffoundry.bench.pages docs/benchmarks/*.json -o docs/benchmarks.md
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from ..common.errors import DiffoundryError
from ..common.files import replacing
from ..common.markup import printable
from . import units
from .report import OURS, Report, System, load
from .sections import Section, failures, sections
from .timing import median

BY_HAND = "other.md"
"""In the folder that is named like the page: it stands at the end of the page as it is."""
_SPECIAL = re.compile(r"([\\`*\[\]<>|#~$&]|(?<!\w)_|_(?!\w))")
_INTRODUCTION = """\
Ours and the others draw the same picture turn by turn, in one run on one machine, each in a process of its own.
Ratios are their seconds over ours, pair by pair: above 1 we are faster. In brackets stand the quartiles."""
_NO_GPU = """\
All of it was measured on CPUs. Nothing on this page says how fast anything is on a GPU: [Engines](engines.md) says \
what was run there."""


def page(reports: Mapping[str, Report], by_hand: str = "", folder: str = "benchmarks") -> str:
    """The page, in Markdown. reports: by the names of their files, which give the order.

    by_hand: Markdown to stand at the end. folder: of the reports, as the page links to it.
    """
    named = [(name, reports[name]) for name in sorted(reports)]
    made = f"<!-- made by: python -m diffoundry.bench.pages docs/{folder}/*.json -o docs/{folder}.md -->"
    blocks = ["# Benchmarks", made]
    blocks += [_INTRODUCTION] if named else []
    blocks += [] if any(report.machine.gpu for _, report in named) else [_NO_GPU]
    blocks += [_table(_overview(named))] if len(named) > 1 else []
    blocks += [block for name, report in named for block in _report(report, f"{folder}/{name}")]
    if by_hand.strip():
        blocks.append(by_hand.strip())
    return "\n\n".join(blocks) + "\n"


def text(value: str) -> str:
    """`value` as one line of Markdown that shows it as it is, in a table too."""
    return _SPECIAL.sub(r"\\\1", units.plain(value, 400))


def _overview(named: Sequence[tuple[str, Report]]) -> Section:
    """Our time and each peer's ratio, a row for each report."""
    peers = sorted({each.name for _, report in named for each in report.systems if each.name != OURS})
    rows = []
    for _, report in named:
        ours = report.system(OURS)
        own = units.seconds(median([turn.seconds for turn in ours.turns]) if ours and ours.turns else None)
        cells = [_in_short(report.system(peer)) for peer in peers]
        rows.append((f"{units.heading(report)}; {units.plain(report.machine.processor, 60)}", own, *cells))
    return Section("", ("what", "diffoundry", *peers), tuple(rows))


def _in_short(system: System | None) -> str:
    if system is None:
        return units.NOTHING
    if system.ratio is None:
        return "failed" if system.error else units.NOTHING
    return units.digits(system.ratio.median) + (f" {units.MARK}" if system.changes_picture else "")


def _report(report: Report, link: str) -> list[str]:
    """The blocks of one report."""
    date = units.plain(report.date, 40).partition("T")[0]
    facts = f"{text(units.machine(report))}; {text(date)}; [report](<{link.replace('>', '%3E')}>)"
    blocks = [f"## {text(units.heading(report))}", facts, _fenced(report.command)]
    if not report.complete:
        blocks.append("The run was interrupted: this is what was measured until then.")
    for section in sections(report):
        blocks += [f"**{text(section.title)}**", _table(section), *([text(section.note)] if section.note else [])]
    remarks = [f"- {text(title)} failed: {text(why)}" for title, why in failures(report)]
    remarks += [f"- {text(note)}" for note in report.notes]
    return [*blocks, *(["\n".join(remarks)] if remarks else []), *_versions(report)]


def _fenced(command: str) -> str:
    """The command as a block; a fence that is longer than any in it."""
    line = printable(command).strip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}sh\n{line}\n{fence}"


def _table(section: Section) -> str:
    rule = "|" + "---|" + "---:|" * (len(section.header) - 1)
    rows = ["| " + " | ".join(map(text, row)) + " |" for row in (section.header, *section.rows)]
    return "\n".join([rows[0], rule, *rows[1:]])


def _versions(report: Report) -> list[str]:
    """The versions of each system, each name once."""
    lines = []
    for system in report.systems:
        told = ", ".join(f"{units.plain(key, 40)} {units.plain(value, 40)}" for key, value in system.versions.items())
        if told:
            lines.append(f"- {text(system.title or system.name)}: {text(told)}")
    return ["\n".join(["Versions:", "", *lines])] if lines else []


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The page to write.")
def main(files: tuple[Path, ...], output: Path) -> None:
    """Write the page of the reports in FILES, in the order of their names."""
    by_hand = output.with_suffix("") / BY_HAND
    try:
        reports = {path.name: load(path) for path in files}
        kept = by_hand.read_text("utf-8") if by_hand.is_file() else ""
        made = page(reports, kept, output.stem)
        with replacing(output) as beside:
            beside.write_text(made, encoding="utf-8")
    except (DiffoundryError, OSError) as error:
        sys.exit(f"Error: {error}")
    click.echo(str(output))


if __name__ == "__main__":
    main()
