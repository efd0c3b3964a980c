"""A report on the terminal: tables where they fit, else a line for each figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import units
from .report import OURS, Report, Stages, System
from .sections import Section, failures, sections
from .timing import median

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

_GAP = 2
_STAGES = (
    ("before the first step", "before"),
    ("  tokenizer", "tokenize"),
    ("  text encoders", "text"),
    ("all steps", "whole"),
    ("  first step", "first_step"),
    ("  denoiser", "denoiser"),
    ("  the loop's own work", "loop"),
    ("after the last step", "after"),
    ("  decoder", "decode"),
)
"""What is shown of a turn, and its field in `Stages`; what stands further in is a part of what stands before it."""


def show(report: Report, console: Console) -> None:
    """Print the report. Nothing is cut off in a narrow terminal."""
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=False)

    line(units.heading(report), "bold")
    line(units.machine(report))
    if not report.complete:
        line("The run did not go to its end: this is what was measured.", "bold")
    ours = report.system(OURS)
    shares = None if ours is None else _shares(ours)
    for section in (*sections(report), *([] if shares is None else [shares])):
        console.print()
        line(section.title, "bold")
        console.print(laid_out(section, console.width))
        if section.note:
            line(section.note, "dim")
    memory = "" if ours is None else _memory(report, ours)
    if memory:
        line(memory, "dim")
    for title, why in failures(report):
        line(f"{title}: {why}", "red")
    for note in report.notes:
        line(f"Note: {units.plain(note, 400)}", "dim")


def _memory(report: Report, ours: System) -> str:
    """Our peak memory beside the weights that were loaded."""
    weights = sum(each.weights_bytes or 0 for each in report.components)
    if not weights or not ours.peak_rss_bytes:
        return ""
    peak, times = units.size(ours.peak_rss_bytes), units.digits(ours.peak_rss_bytes / weights)
    return f"Our process had {peak} at most, {times} times its weights of {units.size(weights)}."


def _shares(ours: System) -> Section | None:
    """The stages of our median turn, and their shares of it; None where they are not told."""
    whole = median([turn.seconds for turn in ours.turns]) if ours.turns else 0.0
    rows = []
    for title, name in _STAGES:
        told = [_spent(turn.stages, name) for turn in ours.turns]
        spent = [each for each in told if each is not None]
        if spent and whole:
            rows.append((title, units.seconds(median(spent)), units.share(median(spent) / whole)))
    return (
        Section(f"Where our time goes: {units.plain(ours.title)}", ("stage", "time", "share"), tuple(rows))
        if rows
        else None
    )


def _spent(stages: Stages, name: str) -> float | None:
    if name == "whole":
        return None if stages.first_step is None else stages.first_step + sum(stages.steps)
    found = getattr(stages, name)
    return (sum(found) if found else None) if isinstance(found, tuple) else found


def laid_out(section: Section, width: int) -> RenderableType:
    """A table, or, where one does not fit, a line for each figure."""
    from rich.table import Table
    from rich.text import Text

    columns = list(zip(section.header, *section.rows, strict=True))
    widths = [max(Text(cell).cell_len for cell in column) for column in columns]
    if sum(widths) + _GAP * (len(widths) - 1) > width:
        return Text("\n").join(_lines(section))
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    for i, name in enumerate(section.header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _lines(section: Section) -> list[Text]:
    """Each row as its name and, further in, a line for each figure that it has."""
    from rich.text import Text

    made = []
    for name, *cells in section.rows:
        made.append(Text(name))
        figures = [(head, cell) for head, cell in zip(section.header[1:], cells, strict=True) if cell != units.NOTHING]
        made += [Text(f"  {head}: {cell}") for head, cell in figures]
    return made
