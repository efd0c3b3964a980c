"""The tables that a page shows of a report, as texts; how they are written down is the page's own matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from . import units
from .parts import ORDER, TITLES, parts_of
from .report import Cold, ComponentCost, Offline, Report, Server, System
from .timing import further_step, images_per_s, median, percentile

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A table. header: one text for each column, the first of which names the row. note: stands below it, or ""."""

    title: str
    header: Row
    rows: tuple[Row, ...]
    note: str = ""


def sections(report: Report) -> tuple[Section, ...]:
    """All tables that have rows: summary, cold start, stages, components, scenario."""
    made = (_summary(report), _cold(report), _stages(report), _inner(report), _components(report), _scenario(report))
    return tuple(section for section in made if section.rows)


def failures(report: Report) -> tuple[tuple[str, str], ...]:
    """The systems that failed, wholly or in part, with the reason."""
    return tuple(
        (units.plain(each.title or each.name), units.plain(each.error, 400)) for each in report.systems if each.error
    )


def _summary(report: Report) -> Section:
    header = ("system", "precision", "p50", "p90", "p99", "pictures/s", "ratio", "ratio of a step", "picture", "memory")
    note = (
        "A turn is a warm call from prompt to pictures. Ratio: their seconds over ours, pair by pair, with quartiles. "
        "Memory: the most that the process has had. " + units.footnote(report)
    )
    rows = tuple(_summary_row(report, each) for each in report.systems if each.turns)
    counts = sorted({len(each.turns) for each in report.systems if each.turns})
    title = "Turns" if not counts else f"Turns (n = {', '.join(map(str, counts))})"
    return Section(title, header, rows, note.strip())


def _summary_row(report: Report, system: System) -> Row:
    spent = [turn.seconds for turn in system.turns]
    memory = units.size(system.peak_rss_bytes)
    if system.peak_gpu_bytes is not None:
        memory += f", GPU {units.size(system.peak_gpu_bytes)}"
    pictures = images_per_s(system.turns, report.request.count) if median(spent) > 0 else None
    return (
        units.marked(system),
        units.plain(system.precision, 20),
        *(units.seconds(percentile(spent, share)) for share in (50, 90, 99)),
        units.NOTHING if pictures is None else units.digits(pictures),
        units.ratio(system.ratio, system.name),
        units.ratio(system.ratio_step, system.name),
        units.picture(report, system),
        memory,
    )


def _cold(report: Report) -> Section:
    header = ("system", "imports done", "loaded", "first step done", "first picture", "smallest to largest", "starts")
    rows = tuple(_cold_row(each) for each in report.systems if each.cold)
    return Section("Cold start", header, rows, "From the start of the process; medians.")


def _cold_row(system: System) -> Row:
    def shown(values: Sequence[float | None]) -> str:
        told = [value for value in values if value is not None]
        return units.seconds(median(told) if len(told) == len(values) else None)

    starts: tuple[Cold, ...] = system.cold
    last = [start.first_image_s for start in starts]
    return (
        units.marked(system),
        shown([start.import_s for start in starts]),
        shown([start.load_s for start in starts]),
        shown([start.first_step_s for start in starts]),
        shown(last),
        f"{units.seconds(min(last))} to {units.seconds(max(last))}" if len(last) > 1 else units.NOTHING,
        str(len(starts)),
    )


def _stages(report: Report) -> Section:
    header = ("system", *(TITLES[key] for key in ORDER), "not told apart", "a further step")
    rows = tuple(_stages_row(each, report.request.steps) for each in report.systems if each.turns)
    return Section("Stages", header, rows, "Medians of the turns.")


def _stages_row(system: System, steps: int) -> Row:
    parts = parts_of(system, steps)
    told = {part.key: units.seconds(part.seconds) for part in parts if part.key in ORDER}
    merged = [f"{units.seconds(part.seconds)} ({part.title})" for part in parts if part.key not in ORDER]
    whole = [f"{units.seconds(part.seconds)} (all)" for part in parts if part.key not in ORDER and len(parts) == 1]
    each = [step for turn in system.turns if (step := further_step(turn)) is not None]
    return (
        units.marked(system),
        *(told.get(key, units.NOTHING) for key in ORDER),
        "; ".join(whole or merged) or units.NOTHING,
        units.seconds(median(each) if each else None),
    )


_INNER = {
    "tokenize": "tokenize",
    "text": "text encoders",
    "image_encode": "image encoder",
    "denoiser": "denoiser, all steps",
    "loop": "rest of the steps",
    "decode": "decoder",
}


def _inner(report: Report) -> Section:
    """The finer stages of those systems that tell them."""
    told = {each.name: {key: _spent(each, key) for key in _INNER} for each in report.systems}
    shown = [key for key in _INNER if any(values[key] is not None for values in told.values())]
    rows = tuple(
        (units.marked(each), *(units.seconds(told[each.name][key]) for key in shown))
        for each in report.systems
        if any(value is not None for value in told[each.name].values())
    )
    return Section("Inside the stages", ("system", *(_INNER[key] for key in shown)), rows, "Medians of the turns.")


def _spent(system: System, key: str) -> float | None:
    """The median seconds of a finer stage in a turn, None where not every turn tells it."""
    found = [getattr(turn.stages, key) for turn in system.turns]
    spent = [sum(each) if isinstance(each, tuple) else each for each in found if each not in (None, ())]
    return median(spent) if spent and len(spent) == len(found) else None


def _components(report: Report) -> Section:
    header = (
        "component",
        "calls",
        "a call",
        "a picture",
        "operations",
        "bytes",
        "of the matmul peak",
        "of the copy peak",
    )
    rows = tuple(_component_row(each) for each in report.components)
    return Section("Our components against the machine", header, rows, _peaks(report))


def _component_row(component: ComponentCost) -> Row:
    return (
        units.plain(component.name, 60),
        f"{component.calls_per_picture:,.4g}",
        units.seconds(component.seconds_per_call),
        units.seconds(component.seconds_per_call * component.calls_per_picture),
        units.amount(component.flops),
        units.amount(component.bytes),
        units.share(component.share_of_matmul_peak),
        units.share(component.share_of_copy_peak),
    )


def _peaks(report: Report) -> str:
    peaks = report.machine.peaks
    found = [
        f"matmul in {units.plain(key, 20)} {units.rate(value, 'flop/s')}"
        for key, value in peaks.matmul_flops_per_s.items()
    ]
    if peaks.copy_bytes_per_s is not None:
        found.append(f"copy {units.rate(peaks.copy_bytes_per_s, 'B/s')}")
    return f"Peaks measured in the same run: {', '.join(found)}." if found else ""


def _scenario(report: Report) -> Section:
    titles = {each.name: units.marked(each) for each in report.systems}
    return (
        _server(report.scenario.server, titles) if report.scenario.server else _offline(report.scenario.offline, titles)
    )


def _server(found: Sequence[Server], titles: Mapping[str, str]) -> Section:
    header = ("system", "limit of p99", "rate under it", "rates tried: p99")
    rows = tuple(
        (
            titles.get(each.system, units.plain(each.system)),
            units.seconds(each.p99_limit_s),
            f"{units.digits(each.rate_per_s)} /s" if each.rate_per_s > 0 else "none",
            _listed(
                f"{units.digits(rate)} /s: {units.seconds(p99)}"
                for rate, p99 in sorted((t.rate, t.p99) for t in each.tried)
            ),
        )
        for each in found
    )
    return Section("Server", header, rows, "Latency is counted from the arrival of a request to its picture.")


def _offline(found: Sequence[Offline], titles: Mapping[str, str]) -> Section:
    header = ("system", "pictures/s", "denoiser rows/s", "batch", "batches tried: pictures/s")
    rows = tuple(
        (
            titles.get(each.system, units.plain(each.system)),
            units.digits(each.images_per_s),
            units.digits(each.rows_per_s),
            str(each.batch),
            _listed(
                f"{batch}: {units.digits(rate)}"
                for batch, rate in sorted((t.batch, t.images_per_s) for t in each.tried)
            ),
        )
        for each in found
    )
    return Section("Offline", header, rows, "The largest throughput over the batches.")


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(texts) or units.NOTHING
