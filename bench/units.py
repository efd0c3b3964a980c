"""How figures and names are written in tables, drawings and pages: units, digits, and what stands in for nothing."""

from __future__ import annotations

from ..common.markup import printable
from .report import OURS, Ratio, Report, System

NOTHING = "–"
"""Stands where there is no figure."""
MARK = "†"
"""Behind what belongs to a system whose picture differs from the reference."""
_LARGEST = 10**30


def plain(text: object, most: int = 200) -> str:
    """`text` as one line of at most `most` characters, single spaces between its words."""
    line = " ".join(printable(text).split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def digits(value: float, count: int = 3) -> str:
    """`value` with `count` digits and no exponent: `0.0412`, `4.05`, `1,230`."""
    if value == 0:
        return "0"
    size = f"{abs(value):.{count - 1}e}"  # rounded first: 9.996 has one digit before the point more than it seems
    after = count - 1 - int(size.partition("e")[2])
    return f"{value:,.{max(0, min(after, 12))}f}"


def seconds(value: float | None) -> str:
    """A duration given in seconds, with three digits and the unit that suits it."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0 s"
    for scale, unit, from_ in ((3600, "h", 7200), (60, "min", 600), (1, "s", 0.9995), (1e-3, "ms", 0.9995e-3)):
        if value >= from_:
            return f"{digits(value / scale)} {unit}"
    return f"{digits(value / 1e-6)} µs"


def size(value: int | None) -> str:
    """A number of bytes."""
    if value is None:
        return NOTHING
    number = min(value, _LARGEST)
    return f"{digits(number / 2**30)} GiB" if number >= 2**30 else f"{digits(number / 2**20)} MiB"


def rate(value: float | None, unit: str) -> str:
    """Something a second, such as `unit` = `flop/s`, with the prefix that suits it."""
    if value is None:
        return NOTHING
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{digits(value / scale)} {prefix}{unit}"
    return f"{digits(value)} {unit}"


def amount(value: float | None) -> str:
    """A count of operations or bytes, in thousands, millions or (US) billions."""
    if value is None:
        return NOTHING
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{digits(value / scale)} {prefix}"
    return digits(value)


def share(value: float | None) -> str:
    """A part of a whole, 0 to 1, as a percentage."""
    return NOTHING if value is None else f"{100 * value:.0f} %"


def ratio(value: Ratio | None, name: str = "") -> str:
    """`4.05 (4.01 to 4.12)`: the median and its quartiles. name: of the system it belongs to."""
    if value is None:
        return "1" if name == OURS else NOTHING
    return f"{digits(value.median)} ({digits(value.low)} to {digits(value.high)})"


def marked(system: System) -> str:
    """The title of a system, with the mark when its picture differs from the reference."""
    title = plain(system.title or system.name)
    return f"{title} {MARK}" if system.changes_picture else title


def picture(report: Report, system: System) -> str:
    """How a system's picture differs from the reference."""
    if system.max_levels is None:
        is_reference = bool(system.turns) and report.reference == f"{system.name}, {system.precision}"
        return "reference" if is_reference else NOTHING
    if system.max_levels == 0:
        return "identical"
    levels = "1 level" if system.max_levels == 1 else f"{min(system.max_levels, _LARGEST)} levels"
    text = levels if system.psnr_db is None else f"{system.psnr_db:.1f} dB, {levels}"
    return f"{text} {MARK}" if system.changes_picture else text


def footnote(report: Report) -> str:
    """What the mark and the levels mean; "" when there was nothing to compare."""
    if not any(each.max_levels is not None for each in report.systems):
        return ""
    text = f"Pictures are held against {plain(report.reference) or 'a reference'}; a level is 1 of 255."
    if any(each.changes_picture for each in report.systems):
        text += f" {MARK}: the picture differs by more than one level: that system does not do the same work."
    return text


def heading(report: Report) -> str:
    """Bundle, size, steps, precision, engine: what was drawn."""
    request = report.request
    parts = [
        f"{request.width}×{request.height}",
        "1 step" if request.steps == 1 else f"{request.steps} steps",
        f"guidance {request.guidance:g}",
        request.scheduler or "",
        f"{request.count} pictures" if request.count > 1 else "",
        f"{request.precision} on {request.engine}",
    ]
    return f"{plain(report.bundle.name, 60)}: {', '.join(plain(part, 40) for part in parts if part)}"


def machine(report: Report) -> str:
    """Processor, cores, threads and GPU, in one line."""
    machine, threads = report.machine, report.request.threads
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    text = f"{plain(machine.processor, 80) or 'unknown processor'}, {cores}"
    if threads != machine.cores:
        text += f", {threads} thread{'s' * (threads != 1)}"
    return f"{text}; {plain(machine.gpu.name, 80)}" if machine.gpu else text
