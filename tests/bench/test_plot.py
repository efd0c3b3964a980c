"""A report is drawn: everything that it holds is in the drawing, and nothing is cut off."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffoundry.bench import plot
from diffoundry.common.errors import BenchError, DiffoundryError
from diffoundry.tests.bench.reports import ALL, HOSTILE, extremes, five, report, server, system


@pytest.fixture
def drawn():
    """The drawing of a report, laid out."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def draw(made):
        with rc_context(plot.SETTINGS):
            figure = plot.draw(made)
            FigureCanvasAgg(figure).draw()
        return figure

    return draw


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


@pytest.mark.parametrize("name", list(ALL))
def test_every_report_can_be_drawn(name, tmp_path):
    plot.plot(ALL[name](), tmp_path / "plot.png")
    image = np.asarray(Image.open(tmp_path / "plot.png").convert("L"))
    assert len(np.unique(image)) > 20
    assert list(tmp_path.iterdir()) == [tmp_path / "plot.png"]


def test_a_vector_drawing_is_well_formed_and_the_same_each_time(tmp_path):
    made = report(system(title=HOSTILE), system("peer", HOSTILE, 0.2))
    for name in ("a.svg", "b.SVG"):
        plot.plot(made, tmp_path / name)
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.SVG").read_bytes()


@pytest.mark.parametrize("made", [five(), extremes(), server(), report()], ids=["five", "extremes", "server", "one"])
def test_nothing_leaves_the_drawing_and_names_do_not_touch(made, drawn):
    from matplotlib.text import Text

    figure = drawn(made)
    page = figure.bbox
    for text in figure.findobj(Text):
        if text.get_visible() and re.search(
            r"[a-z]", text.get_text()
        ):  # figures of an axis beyond its end are not drawn
            box = text.get_window_extent()
            assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, text.get_text()
            assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, text.get_text()
    labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(labels))


def test_the_drawing_says_what_was_measured(drawn):
    shown = "\n".join(texts(drawn(five())))
    for words in ("pico", "64×64", "20 steps", "fp32", "EPYC", "4.02 × our time", "failed: RuntimeError", "first step"):
        assert words in shown
    marked = [line for line in shown.splitlines() if plot.units.MARK in line]
    assert any("stable-diffusion.cpp" in line for line in marked)
    assert not any("diffusers 0.36" in line for line in marked)


def test_bars_are_as_long_as_the_turns(drawn):
    axes = drawn(report(system(), system("peer", "peer", 0.4))).axes[0]
    ends = {}
    for bar in axes.patches:
        place = round(bar.get_y() + bar.get_height() / 2)
        ends[place] = max(ends.get(place, 0), bar.get_x() + bar.get_width())
    assert ends[0] == pytest.approx(100, rel=0.05)  # milliseconds
    assert ends[1] == pytest.approx(400, rel=0.05)


def test_an_interrupted_run_says_so(drawn):
    assert any("interrupted" in text for text in texts(drawn(report(complete=False))))
    assert not any("interrupted" in text for text in texts(drawn(report())))


def test_the_mark_stays_where_a_name_is_cut(drawn):
    made = report(system(title="name " * 40, changes_picture=True, max_levels=9, psnr_db=30.0))
    assert plot.units.MARK in drawn(made).axes[0].get_yticklabels()[0].get_text()


@pytest.mark.parametrize(
    ("name", "words"), [("plot.gif", ".png or .svg"), ("plot", ".png or .svg"), ("no/plot.png", "does not exist")]
)
def test_other_files_are_refused_before_anything_is_drawn(name, words, tmp_path):
    with pytest.raises(BenchError, match=words):
        plot.check(tmp_path / name)
    with pytest.raises(BenchError, match=words):
        plot.plot(report(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DiffoundryError, match=r"bench --plot needs matplotlib: run `pip install 'diffoundry\[plot\]'`"):
        plot.plot(report(), tmp_path / "plot.png")


def test_nothing_heavy_is_imported_ahead():
    code = "import sys, diffoundry.bench.plot; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_turn_of_no_time_is_drawn(tmp_path):
    plot.plot(report(replace(system(), turns=system(seconds=0.0).turns)), tmp_path / "plot.png")
