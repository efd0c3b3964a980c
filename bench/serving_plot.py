"""`bench.serving --plot`: latencies and throughput of mixed load, by load and way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import plot
from .serving_figures import LONG, SHORT, Measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEIGHT = 11.0, 4.2
_BAR = 0.27
"""The width of a bar; there is one for each way beside each other at a load."""


def write(measured: Sequence[Measured], path: Path) -> None:
    """Draw into a .png or .svg file. Raises `DiffoundryError` as `plot.check` does, and `OSError`."""
    plot.write(path, lambda: draw(measured))


def draw(measured: Sequence[Measured]) -> Figure:
    """p99 of the short and of the long requests, and throughput; a line for each way, a place for each load."""
    from matplotlib.figure import Figure

    loads = sorted({each.load for each in measured}, key=lambda load: (load is None, load or 0.0))
    names = [next(each.name for each in measured if each.load == load) for load in loads]
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots(1, 3)
    panels: tuple[tuple[str, Callable[[Measured], float | None]], ...] = (
        (f"{SHORT} steps: p99 in ms, logarithmic", lambda each: each.latency_ms.get(SHORT, {}).get("p99")),
        (f"{LONG} steps: p99 in ms, logarithmic", lambda each: each.latency_ms.get(LONG, {}).get("p99")),
        ("pictures a second", lambda each: each.images_per_s),
    )
    for own, (title, value_of) in zip(axes, panels, strict=True):
        _draw_bars(own, measured, loads, value_of)
        own.set_title(title, loc="left", fontsize=10)
        own.set_xticks(range(len(loads)), [name.replace(" of ", "\n of ") for name in names], fontsize=8)
    latencies = [value for _, value_of in panels[:2] for each in measured if (value := value_of(each)) is not None]
    for own in axes[:2]:
        own.set_yscale("log")
        own.set_ylim(min(latencies) / 2, 1.7 * max(latencies))
        own.yaxis.set_major_formatter("{x:g}")
        own.yaxis.set_minor_formatter("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, fontsize=9, frameon=False)
    return figure


def _draw_bars(
    axes: Axes,
    measured: Sequence[Measured],
    loads: Sequence[float | None],
    value_of: Callable[[Measured], float | None],
) -> None:
    ways = list(dict.fromkeys(each.way for each in measured))
    for i, way in enumerate(ways):
        found = {each.load: value_of(each) for each in measured if each.way == way}
        shift = _BAR * (i - (len(ways) - 1) / 2)
        bars = [(j + shift, value) for j, load in enumerate(loads) if (value := found.get(load)) is not None]
        places, values = [place for place, _ in bars], [value for _, value in bars]
        drawn = axes.bar(places, values, 0.94 * _BAR, color=plot.LINES[i], label=way)
        axes.bar_label(drawn, [_digits(value) for value in values], fontsize=6, padding=1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
