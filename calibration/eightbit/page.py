"""`inspect --report`: what was measured of a denoiser in eight bits, as one page with pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...bundle import EIGHT_BIT, Bundle
from ...bundle.reports import read_report
from ...common.errors import BundleError
from ...common.files import replacing
from ...common.markup import Markup, document, tag
from .controlled import CONTROLLED, under_controls
from .conversion import FEW_KEYS, LOSS, PICTURES, UNSEEN
from .pictures import GAIN, ROWS
from .stage import REPORT
from .times import describe, warnings

_WIDTH, _HEIGHT, _LEFT, _BELOW = 760.0, 220.0, 60.0, 30.0
"""Of a chart, and of what its axes take; in units of the picture."""


def write(bundle: Bundle, path: Path) -> None:
    """Write the page to `path`.

    Raises `BundleError` when the bundle has nothing in eight bits or its reports are damaged, `DiffoundryError` when
    the file cannot be written.
    """
    name = bundle.manifest.named("denoiser")
    found = {
        precision: components[name]
        for precision, components in read_report(bundle, "precision").items()
        if precision in EIGHT_BIT and isinstance(components, dict) and name in components
    }
    if not found:
        raise BundleError(
            f"{bundle.root} has nothing in eight bits to report: run `diffoundry build {bundle.root} --precision int8`"
        )
    quality, times = read_report(bundle, "quality"), read_report(bundle, REPORT)
    try:
        body = [tag("h1", f"{bundle.root.name}: {name} in {' and '.join(found)}")]
        for precision, report in found.items():
            mine = {key: each for key, each in times.items() if key.partition("/")[0] == precision}
            body += _section(bundle, name, precision, report, quality[precision], mine)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise BundleError(f"the reports of {bundle.root} are damaged: build it again with --scan-steps") from None
    with replacing(path) as part:
        part.write_text(document(f"{bundle.root.name} in eight bits", *body), encoding="utf-8")


def _section(
    bundle: Bundle, name: str, precision: str, report: Any, quality: Any, times: Mapping[str, Any]
) -> Iterator[Markup]:
    scan, nodes = report["scan"], report["nodes"]
    count = nodes["low"] + nodes["kept"]
    asked = quality.get("budget") or f"a median PSNR of {quality['budget_db']:g} dB"
    size = "×".join(map(str, scan["size"]))
    yield tag("h2", precision)
    yield tag(
        "p",
        f"{nodes['low']} of {count} layers with {100 * report['share']:.1f} % of the arithmetic are in {precision}. "
        f"Pictures are {quality['psnr_db']:.1f} dB from fp32 in the median, {quality['worst_db']:.1f} dB at worst; "
        f"asked was {asked}. {len(scan['prompts'])} prompts, {scan['steps']} steps of {size}, guidance "
        f"{scan['guidance']:g}, seeds from {scan['seed']} on.",
    )
    if quality.get(CONTROLLED):
        yield tag("p", f"{under_controls(quality[CONTROLLED]).capitalize()}.")
    yield from (tag("p", describe(key, each)) for key, each in times.items())
    yield from (tag("p", f"Warning: {line}.") for each in times.values() for line in warnings(each))
    yield from _pictures(bundle, name, precision, quality)
    yield from _curve(precision, report, times)
    yield from _timesteps(report)
    yield from _kept(report)
    yield from _layers(report)


def _pictures(bundle: Bundle, name: str, precision: str, quality: Any) -> Iterator[Markup]:
    path = f"{name}/{PICTURES.format(precision)}"
    if path not in bundle.manifest.all_files():
        return
    bundle.check([path])
    data = base64.b64encode(bundle.path(path).read_bytes()).decode("ascii")
    image = tag(
        "img", src=f"data:image/png;base64,{data}", alt=f"fp32, {precision}, difference", style="max-width:100%"
    )
    rows = [f"{each['prompt']} (seed {each['seed']}): {each['psnr_db']:.1f} dB" for each in quality["prompts"]]
    told = tag("figcaption", f"Left fp32, middle {precision}, right {GAIN} times the difference.")
    listed = tag("table", *(tag("tr", tag("td", row)) for row in rows[:ROWS]), class_="list")
    yield tag("figure", image, told, listed)


def _curve(precision: str, report: Any, times: Mapping[str, Any]) -> Iterator[Markup]:
    yield tag("h3", "What was drawn on the way")
    header = ["layers' values in fp32", "arithmetic", "weights", "PSNR, median", "worst"]
    header += [f"expected step, {key.partition('/')[2]}" for key in times]
    drawn = [each for each in report["curve"] if each["psnr_db"] is not None]
    rows = []
    for each in report["curve"]:
        row = [f"{each['kept']}", f"{100 * each['share']:.1f} %", f"{each['weights_bytes'] / 1e6:.1f} MB"]
        row += (
            ["not finite", "–"] if each["psnr_db"] is None else [f"{each[k]:.1f} dB" for k in ("psnr_db", "worst_db")]
        )
        for timed in times.values():
            full, low = timed["step_s"]["fp32"], timed["step_s"][precision]
            row.append(f"{1000 * (full + (low - full) * each['share'] / report['share']):.3g} ms")
        rows.append(row)
    yield _table(header, rows)
    if times:
        yield tag(
            "p", "Expected steps lie between the measured ones of fp32 and of the choice, by arithmetic.", class_="soft"
        )
    points = [(100 * each["share"], each["psnr_db"]) for each in drawn]
    if len(points) > 1:
        yield _chart(points, "arithmetic in eight bits, %", "median PSNR, dB")


def _timesteps(report: Any) -> Iterator[Markup]:
    yield tag("h3", "Loss by timestep")
    points = [(each["timestep"], each["loss_db"]) for each in report["by_timestep"]]
    yield tag(
        "p", "Signal to noise of the denoiser's output in single calls, all chosen layers in eight bits.", class_="soft"
    )
    yield _chart(points, "timestep", "signal to noise, dB")


def _kept(report: Any) -> Iterator[Markup]:
    yield tag("h3", "What stayed in higher precision")
    if not report["islands"]:
        yield tag("p", "No layer that has a form in eight bits.")
        return
    why = {
        LOSS: "loses most for its arithmetic",
        UNSEEN: "its value was zero in every call",
        FEW_KEYS: "an attention to so few keys is no kernel of its own in eight bits",
    }
    rows = [
        [each["node"], each["op"], why.get(each["reason"], each["reason"]), _decibels(each.get("measured"))]
        for each in report["islands"]
    ]
    yield _table(["layer", "operator", "why", "loss alone"], rows)


def _layers(report: Any) -> Iterator[Markup]:
    yield tag("h3", "Layers, those that lose most first")
    yield tag(
        "p",
        "Losses are signal to noise: more is better. Alone: of the denoiser's output with this value alone in eight "
        "bits. Of its outputs: of what the layers make. The method chose where numbers are cut off: amax at the "
        "largest, a percentile, where the squared error (mse) or the entropy is best; smooth α moved what stands out "
        "in a few channels into the weights. Stretches go from picture to noise; in one with 0 no step fell.",
        class_="soft",
    )
    header = ["value", "layers", "in 8 bits", "arithmetic", "loss alone", "loss of its outputs", "method", "scale"]
    header.append("largest, by stretch of timesteps; of an attention: queries, keys, values")
    rows = [
        [
            each["value"],
            ", ".join(each["layers"]),
            "yes" if each["low"] else "no",
            f"{100 * each['share']:.2f} %",
            _decibels(each["loss_alone_db"]),
            _decibels(each["loss_of_outputs_db"]),
            each["method"],
            ", ".join(f"{x:.3g}" for x in _listed(each["scale"])),
            ", ".join(f"{x:.3g}" for x in each["largest"]),
        ]
        for each in sorted(report["groups"], key=lambda each: float(each["loss_alone_db"]))
    ]
    yield _table(header, rows)
    mended = "corrected" if report["biases_corrected"] else "left as they were: correcting them lost more"
    yield tag("p", f"Biases were {mended}.", class_="soft")


def _listed(scale: Any) -> list[float]:
    """The scales of what an attention reads, or the one of a value."""
    return scale if isinstance(scale, list) else [scale]


def _decibels(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} dB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    head = tag("thead", tag("tr", *(tag("th", text, scope="col") for text in header)))
    lines = (tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in cells)) for first, *cells in rows)
    return tag("div", tag("table", head, tag("tbody", *lines)), class_="wide")


def _chart(points: Sequence[tuple[float, float]], across: str, up: str) -> Markup:
    """Points joined by a line, in SVG."""
    xs, ys = zip(*sorted(points), strict=True)
    low, high = min(ys), max(ys)
    reach, width = (high - low) or 1.0, (xs[-1] - xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = (x - xs[0]) / width, 1 - (y - low) / reach
        return _LEFT + across * (_WIDTH - 2 * _LEFT), 20 + down * (_HEIGHT - 2 * _BELOW)

    spots = [place(*each) for each in zip(xs, ys, strict=True)]
    path = " ".join(f"{'ML'[bool(i)]}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(spots))
    marks = [
        tag("circle", tag("title", f"{x:g}: {y:g}"), cx=a, cy=b, r=4.0, class_="turn")
        for (a, b), x, y in zip(spots, xs, ys, strict=True)
    ]
    ends = [
        tag("text", f"{xs[0]:.4g}", x=_LEFT, y=_HEIGHT - 18, class_="middle"),
        tag("text", f"{xs[-1]:.4g}", x=_WIDTH - _LEFT, y=_HEIGHT - 18, class_="middle"),
        tag("text", across, x=_WIDTH / 2, y=_HEIGHT - 4, class_="middle"),
        tag("text", f"{high:.4g}", x=_LEFT - 8, y=24.0, class_="end"),
        tag("text", f"{low:.4g}", x=_LEFT - 8, y=_HEIGHT - 2 * _BELOW + 24, class_="end"),
    ]
    line = tag("path", d=path, class_="whisker", fill="none")
    drawing = tag("svg", line, *marks, *ends, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", role="img")
    return tag("figure", drawing, tag("figcaption", up))
