"""`bench --plot`: a report as a drawing, for slides, papers and issues."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import BenchError
from ..common.files import replacing
from ..common.machine import require_modules
from . import units
from .parts import MERGED, TITLES, Part, parts_of
from .report import OURS, Report, System
from .timing import median, percentile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
COLOURS = {"before": "#ddaa33", "first_step": "#bb5566", "steps": "#004488", "after": "#77ccee", MERGED: "#c4c4c4"}
"""After Paul Tol's schemes: neighbours differ in lightness too, so they do without colour vision and on grey paper."""
LINES = ("#004488", "#bb5566", "#999933", "#44aa99", "#882255", "#777777")
MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCH = "////"
_MERGED_LABEL = "stages that are not told apart"
_WIDTH, _TOP, _LEGEND, _ROW, _BELOW = 11.0, 1.9, 0.2, 0.62, 3.0
"""Inches: of the drawing, around its rows, of the legend, of a row, of the scenario below."""
_LABEL, _LABEL_LINES = 30, 2
SETTINGS: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,  # names come from files: a dollar is a dollar
    "text.usetex": False,
    "svg.hashsalt": "diffoundry",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}


def check(path: Path) -> None:
    """Raise `DiffoundryError` when a drawing cannot be written to `path`: suffix, folder, matplotlib missing."""
    if path.suffix.lower() not in SUFFIXES:
        raise BenchError(f"the plot {path} must have a name that ends in .png or .svg")
    if not path.absolute().parent.is_dir():
        raise BenchError(f"the folder {path.parent} does not exist: make it, or choose another --plot")
    require_modules("bench --plot", ["matplotlib"], "plot")


def plot(report: Report, path: Path) -> None:
    """Draw the stages and the latencies of each system, and the scenario, into a .png or .svg file.

    Raises `DiffoundryError` as `check` does, before anything is drawn, and `OSError`.
    """
    write(path, lambda: draw(report))


def write(path: Path, drawn: Callable[[], Figure]) -> None:
    """Write what `drawn` draws into a .png or .svg file. Raises as `plot` does."""
    check(path)
    from matplotlib import rc_context

    kind = path.suffix[1:].lower()
    with rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = drawn()
        with replacing(path) as beside:
            figure.savefig(beside, dpi=150, format=kind, metadata={"Date": None} if kind == "svg" else None)


def draw(report: Report) -> Figure:
    """The drawing of a report, not yet written anywhere."""
    from matplotlib.figure import Figure

    systems, tried = report.systems, _scenario_lines(report)
    rows = _TOP + _ROW * max(len(systems), 2)
    figure = Figure(figsize=(_WIDTH, rows + _BELOW * bool(tried)), layout="constrained")
    figure.suptitle(_wrapped(_title(report), 120), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(_footer(report), x=0.01, ha="left", fontsize=7.5, color="#333333")
    heights = [_LEGEND, rows, *([_BELOW] if tried else [])]
    grid = figure.add_gridspec(len(heights), 2, width_ratios=[3, 2], height_ratios=heights)
    stages = figure.add_subplot(grid[1, 0])
    latencies = figure.add_subplot(grid[1, 1], sharey=stages)
    _draw_legend(figure.add_subplot(grid[0, :]), _draw_stages(stages, report))
    _draw_latencies(latencies, systems)
    stages.set_yticks(range(len(systems)), [_label(report, system) for system in systems])
    for tick, system in zip(stages.get_yticklabels(), systems, strict=True):
        tick.set_fontweight("bold" if system.name == OURS else "normal")
    room = 0.5 if len(systems) > 1 else 0.9
    stages.set_ylim(len(systems) - 1 + room, -room)
    latencies.tick_params(labelleft=False, left=False)
    if tried:
        _draw_scenario(figure.add_subplot(grid[2, :]), report, tried)
    return figure


def _title(report: Report) -> str:
    return units.heading(report) + ("" if report.complete else " (interrupted, not complete)")


def _footer(report: Report) -> str:
    lines = [f"{units.machine(report)}; {units.plain(report.date, 40)}", units.footnote(report)]
    return "\n".join(_wrapped(line, 150) for line in lines if line)


def _wrapped(text: str, width: int, most: int = 3) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=most, placeholder=" …"))


def _label(report: Report, system: System) -> str:
    """Title, precision and ratio; the title in at most two lines, so that rows do not touch."""
    lines = textwrap.wrap(units.marked(system), _LABEL, max_lines=_LABEL_LINES, placeholder=" …")
    if system.changes_picture and units.MARK not in lines[-1]:
        lines[-1] += f" {units.MARK}"
    facts = [units.plain(system.precision, 12)]
    if system.ratio is not None:
        facts.append(f"{units.digits(system.ratio.median)} × our time")
    return "\n".join([*lines, ", ".join(fact for fact in facts if fact)])


def _scale(values: Sequence[float]) -> tuple[float, str]:
    """Of an axis of durations in seconds: the length of its unit, and its name."""
    most = max(values, default=1.0)
    for scale, unit, from_ in ((3600.0, "hours", 7200), (60.0, "minutes", 600), (1.0, "seconds", 1.0)):
        if most >= from_:
            return scale, unit
    return (1e-3, "milliseconds") if most >= 1e-3 or most == 0 else (1e-6, "microseconds")


def _draw_stages(axes: Axes, report: Report) -> set[str]:
    """A bar for each system; the keys of its parts."""
    rows = [parts_of(system, report.request.steps) for system in report.systems]
    totals = [median([turn.seconds for turn in system.turns]) if system.turns else 0.0 for system in report.systems]
    scale, unit = _scale(totals)
    longest = max(totals, default=0.0) / scale or 1.0
    for place, (system, parts, total) in enumerate(zip(report.systems, rows, totals, strict=True)):
        if not parts:
            _say(axes, place, system)
            continue
        end = _bar(axes, place, parts, scale)
        axes.text(end + 0.012 * longest, place, units.seconds(total), va="center", ha="left")
    axes.set_xlim(0, 1.16 * longest)
    axes.set(xlabel=f"{unit} a turn, medians")
    axes.set_title("stages", loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return {part.key for parts in rows for part in parts}


def _bar(axes: Axes, place: int, parts: Sequence[Part], scale: float) -> float:
    end = 0.0
    for part in parts:
        length = part.seconds / scale
        hatch = _HATCH if part.key == MERGED else None
        axes.barh(place, length, 0.56, left=end, color=COLOURS[part.key], hatch=hatch, edgecolor="white", linewidth=0.6)
        end += length
    return end


def _say(axes: Axes, place: int, system: System) -> None:
    """Why a row is empty, in its place."""
    text = f"failed: {units.plain(system.error)}" if system.error else "no turn was measured"
    shown = "\n".join(textwrap.wrap(text, 62, max_lines=3, placeholder=" …"))
    axes.annotate(
        shown, (0, place), (4, 0), textcoords="offset points", va="center", style="italic", fontsize=8, color="#990000"
    )


def _draw_legend(axes: Axes, keys: set[str]) -> None:
    from matplotlib.patches import Patch

    axes.set_axis_off()
    names = {**TITLES, MERGED: _MERGED_LABEL}
    handles = [
        Patch(facecolor=colour, edgecolor="white", hatch=_HATCH if key == MERGED else None, label=names[key])
        for key, colour in COLOURS.items()
        if key in keys
    ]
    if handles:
        axes.legend(handles=handles, loc="center left", ncols=len(handles), frameon=False, fontsize=8, borderpad=0)


def _draw_latencies(axes: Axes, systems: Sequence[System]) -> None:
    """Each turn over the median of its system: their spreads compare, however far apart the systems are."""
    rows = {place: _deviations(system) for place, system in enumerate(systems) if system.turns}
    reach = _reach(list(rows.values()))
    for place, values in rows.items():
        shown = [min(max(value, -reach), reach) for value in values]
        offsets = [0.13 * ((i * 0.618034) % 1 - 0.5) for i in range(len(values))]
        if len(values) > 3:
            _box(axes, place, values, reach)
        axes.scatter(shown, [place + 0.12 + each for each in offsets], s=9, color="#004488", alpha=0.65, linewidths=0)
        _say_beyond(axes, place, values, reach)
        axes.text(1.0, place - 0.2, _percentiles(systems[place]), transform=axes.get_yaxis_transform(), fontsize=7.5,
                  ha="right", va="bottom")  # fmt: skip
    axes.set_xlim(-1.08 * reach, 1.08 * reach)
    axes.axvline(0, color="#888888", linewidth=0.8, zorder=0)
    axes.set(xlabel="% from the system's median")
    counts = {len(values) for values in rows.values()}
    turns = f"each turn, n = {counts.pop()}" if len(counts) == 1 else "each turn"
    axes.set_title(f"latency, {turns}", loc="left")
    axes.grid(axis="x", alpha=0.3)


def _deviations(system: System) -> list[float]:
    middle = median([turn.seconds for turn in system.turns])
    return [100 * (turn.seconds / middle - 1) if middle else 0.0 for turn in system.turns]


def _reach(rows: Sequence[Sequence[float]]) -> float:
    """Percent to each side: all but the rarest stragglers are inside."""
    far = [sorted(map(abs, values))[int(0.9 * len(values))] for values in rows]
    return max(3.0, 1.5 * max(far, default=0.0))


def _box(axes: Axes, place: int, values: Sequence[float], reach: float) -> None:
    low, middle, high = (percentile(values, share) for share in (25, 50, 75))
    low, high = max(low, -reach), min(high, reach)
    axes.barh(place + 0.12, high - low, 0.26, left=low, color="#dde6f0", edgecolor="#004488", linewidth=0.9)
    axes.plot([middle, middle], [place - 0.01, place + 0.25], color="#004488", linewidth=1.6)


def _say_beyond(axes: Axes, place: int, values: Sequence[float], reach: float) -> None:
    """An arrow at the edge for the turns that lie beyond it, with the farthest."""
    for sign, arrow, side in ((1, ">", "right"), (-1, "<", "left")):
        beyond = [value for value in values if sign * value > reach]
        if beyond:
            farthest = f"{max(beyond, key=abs):+,.0f} %"
            axes.scatter([sign * reach], [place + 0.12], marker=arrow, s=26, color="#bb5566", linewidths=0, zorder=3)
            axes.text(sign * reach, place + 0.29, farthest, fontsize=7, color="#bb5566", ha=side, va="center")


def _percentiles(system: System) -> str:
    values = [turn.seconds for turn in system.turns]
    return f"p50 {units.seconds(median(values))}, p90 {units.seconds(percentile(values, 90))}"


def _scenario_lines(report: Report) -> dict[str, list[tuple[float, float]]]:
    """Of each system: throughput over the batch, or latency over the rate of arrivals."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for offline in report.scenario.offline:
        lines[offline.system] = sorted((float(each.batch), each.images_per_s) for each in offline.tried)
    for server in report.scenario.server:
        lines[server.system] = sorted((each.rate, each.p99) for each in server.tried)
    return {name: points for name, points in lines.items() if points}


def _draw_scenario(axes: Axes, report: Report, lines: dict[str, list[tuple[float, float]]]) -> None:
    for i, (name, points) in enumerate(lines.items()):
        system = report.system(name)
        label = units.plain(units.marked(system) if system else name, 40)
        colour, marker = LINES[i % len(LINES)], MARKERS[i % len(MARKERS)]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=5)
    for limit in sorted({each.p99_limit_s for each in report.scenario.server}):
        axes.axhline(limit, color="#990000", linestyle="--", linewidth=1, label=f"limit, {units.seconds(limit)}")
    labels = ("pictures in a call", "pictures a second")
    if report.scenario.server:
        labels = ("pictures asked for a second", "99th percentile of latency, s")
    axes.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, None))
    axes.set_title(report.scenario.name, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
