"""A run of `bench --serve` on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import units
from .sections import Row, Section
from .served import PERCENTILES, Figures, Report, Tried
from .table import laid_out

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST = 60


def show(report: Report, console: Console) -> None:
    """Print the report. Nothing is cut off in a narrow terminal."""
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=False)

    keys = f", {report.keys} key{'s' * (report.keys != 1)}" if report.keys else ""
    line(f"{report.url}: {units.plain(', '.join(report.models), 200) or 'models not told'}{keys}", "bold")
    line(f"Asked from {units.plain(report.machine.processor, 80)}, {report.machine.cores} cores")
    if not report.complete:
        line("The run did not go to its end: this is what was measured.", "bold")
    for section in sections(report):
        console.print()
        line(section.title, "bold")
        console.print(laid_out(section, console.width))
        if section.note:
            line(section.note, "dim")
    if report.p99_s is not None:
        console.print()
        line(found(report), "bold")
    for note in report.notes:
        line(f"Note: {units.plain(note, 400)}", "dim")


def found(report: Report) -> str:
    """The highest rate that holds the limit, in one line."""
    limit = f"with p99 within {units.seconds(report.p99_s)}"
    if not report.rate_per_s:
        return f"No rate that was tried holds {limit.removeprefix('with ')} without a refusal"
    return (
        f"Throughput {limit}: {units.digits(report.rate_per_s)} requests/s, "
        f"{units.digits(report.images_per_s or 0.0)} pictures/s"
    )


def sections(report: Report) -> tuple[Section, ...]:
    """The tables: each kind alone, all requests of each rate, and, where there are some, their kinds."""
    made = (_alone(report), _rates(report), *([_kinds(report)] if len(report.kinds) > 1 else []))
    return tuple(section for section in made if section.rows)


def _alone(report: Report) -> Section:
    whole = sum(kind["share"] for kind in report.kinds)
    rows = tuple((_named(kind), units.share(kind["share"] / whole), units.seconds(kind["alone_s"]))
                 for kind in report.kinds)  # fmt: skip
    return Section("What is asked for", ("request", "share", "alone"), rows)


def _rates(report: Report) -> Section:
    header = ("requests/s", "sent", "429", "failed", "Retry-After", *_times(report), "pictures/s")
    rows = tuple(
        (
            _rate(each),
            *(str(count) for count in (each.all.sent, each.all.refused, each.all.failed)),
            _wait(each.all),
            *_latencies(report, each.all),
            units.digits(each.all.images_per_s),
        )
        for each in sorted(report.tried, key=lambda each: each.rate)
    )
    note = "Times are from the planned arrival of a request to its first picture, partial or whole, and to its last."
    if any(not each.complete for each in report.tried):
        note += " …: left early, because the rate does not hold."
    return Section("All requests", header, rows, note)


def _kinds(report: Report) -> Section:
    rows: list[Row] = []
    for each in sorted(report.tried, key=lambda each: each.rate):
        for kind, figures in zip(report.kinds, each.kinds, strict=True):
            rows.append((f"{_rate(each)}/s, {_named(kind)}", str(figures.sent), *_latencies(report, figures)))
    return Section("By kind", ("requests", "sent", *_times(report)), tuple(rows))


def _named(kind: dict[str, str]) -> str:
    return units.plain(kind["text"], _LONGEST)


def _rate(tried: Tried) -> str:
    return units.digits(tried.rate) + ("" if tried.complete else "…")


def _times(report: Report) -> list[str]:
    parts = ["first", "last"] if report.partial_images else ["last"]
    return [f"{part} p{share}" for part in parts for share in PERCENTILES]


def _latencies(report: Report, figures: Figures) -> list[str]:
    told = [figures.first_s, figures.last_s] if report.partial_images else [figures.last_s]
    return [units.seconds(None if each is None else each[f"p{share}"]) for each in told for share in PERCENTILES]


def _wait(figures: Figures) -> str:
    if figures.retry_after_s is None:
        return units.NOTHING
    low, high = (f"{value:g}" for value in figures.retry_after_s)
    return f"{low} s" if low == high else f"{low} to {high} s"
