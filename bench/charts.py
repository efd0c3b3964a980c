"""The two charts of a page, in SVG: stages of each system, and the spread of its turns. Colours are the page's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..common.markup import Markup, join, tag
from . import units
from .parts import MERGED, ORDER, TITLES, parts_of
from .report import Report, System
from .timing import median, percentile

_WIDTH, _LABEL, _VALUE = 760.0, 230.0, 90.0
"""Of a chart, of the names at its left, of the figures at its right; in units of the picture."""
_ROW, _BAR, _HEAD = 40.0, 22.0, 28.0
_LONGEST = 30
"""Characters of a name."""


def stages_chart(report: Report) -> Markup:
    """A bar for each system that has turns, divided by its stages; all on one scale."""
    systems = [each for each in report.systems if each.turns]
    totals = [_median(each) for each in systems]
    scale = (_WIDTH - _LABEL - _VALUE) / (max(totals, default=0.0) or 1.0)
    rows, keys = [], set()
    for i, (system, total) in enumerate(zip(systems, totals, strict=True)):
        top, left = _HEAD + i * _ROW + (_ROW - _BAR) / 2, _LABEL
        rows.append(_name(system, top))
        for part in parts_of(system, report.request.steps):
            keys.add(part.key)
            width = part.seconds * scale
            told = tag("title", f"{part.title}: {units.seconds(part.seconds)}")
            rows.append(tag("rect", told, x=left, y=top, width=width, height=_BAR, class_=f"part {part.key}"))
            left += width
        rows.append(tag("text", units.seconds(total), x=left + 8, y=top + _BAR / 2 + 4))
    return _chart("Stages of a turn, medians", [_legend(keys), *rows], len(systems))


def spread_chart(report: Report) -> Markup:
    """Each turn over the median of its system, with the 10th to the 90th percentile and the quartiles."""
    systems = [each for each in report.systems if each.turns]
    spans = [[turn.seconds / (_median(each) or 1.0) - 1 for turn in each.turns] for each in systems]
    reach = max([0.03, *(1.2 * max(abs(percentile(span, share)) for share in (5, 95)) for span in spans)])
    middle, half = (_LABEL + _WIDTH - _VALUE) / 2, (_WIDTH - _LABEL - _VALUE) / 2
    bottom = _HEAD + len(systems) * _ROW

    def place(value: float) -> float:
        return middle + half * min(max(value / reach, -1.0), 1.0)

    rows = [tag("line", x1=middle, x2=middle, y1=_HEAD, y2=bottom, class_="axis")]
    rows += [
        tag("text", f"{100 * sign * reach:+.0f} %", x=middle + sign * half, y=_HEAD - 8, class_=anchor)
        for sign, anchor in ((-1, "start"), (1, "end"))
    ]
    rows.append(tag("text", "median", x=middle, y=_HEAD - 8, class_="middle"))
    for i, (system, span) in enumerate(zip(systems, spans, strict=True)):
        y = _HEAD + (i + 0.5) * _ROW
        rows.append(_name(system, y - _BAR / 2))
        if len(span) > 3:
            rows.append(_box(span, y, place))
        for j, value in enumerate(span):
            told = tag("title", f"{100 * value:+.1f} %")
            kind = "turn far" if abs(value) > reach else "turn"
            rows.append(tag("circle", told, cx=place(value), cy=y + 7 * ((j * 0.618034) % 1 - 0.5), r=2.2, class_=kind))
        rows.append(tag("text", f"n = {len(span)}", x=_WIDTH - _VALUE + 12, y=y + 4))
    return _chart("Each turn, against the median of its system", rows, len(systems))


def _box(span: Sequence[float], y: float, place: Callable[[float], float]) -> Markup:
    p10, p25, p75, p90 = (place(percentile(span, share)) for share in (10, 25, 75, 90))
    return join(
        tag("line", x1=p10, x2=p90, y1=y, y2=y, class_="whisker"),
        tag("rect", x=p25, y=y - 9, width=p75 - p25, height=18, class_="box"),
    )


def _chart(title: str, rows: Sequence[Markup], count: int) -> Markup:
    height = _HEAD + count * _ROW + 6
    box = f"0 0 {_WIDTH:.0f} {height:.0f}"
    picture = tag("svg", *rows, viewBox=box, role="img", aria_label=title, xmlns="http://www.w3.org/2000/svg")
    return tag("figure", tag("figcaption", title), picture)


def _legend(keys: set[str]) -> Markup:
    titles, left, made = {**{key: TITLES[key] for key in ORDER}, MERGED: "not told apart"}, 0.0, []
    for key, title in titles.items():
        if key in keys:
            made.append(tag("rect", x=left, y=4, width=12, height=12, class_=f"part {key}"))
            made.append(tag("text", title, x=left + 18, y=14))
            left += 40 + 7.2 * len(title)
    return join(*made)


def _name(system: System, top: float) -> Markup:
    title = units.marked(system)
    shown = units.plain(title, _LONGEST)
    if system.changes_picture and not shown.endswith(units.MARK):
        shown += units.MARK
    return tag("text", tag("title", title), shown, x=_LABEL - 10, y=top + _BAR / 2 + 4, class_="end")


def _median(system: System) -> float:
    return median([turn.seconds for turn in system.turns])
