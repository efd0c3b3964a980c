"""A report as a page: complete, self-contained, and nothing in it is taken for markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from diffoundry.bench import page
from diffoundry.bench.sections import failures, sections
from diffoundry.tests.bench.reports import ALL, HOSTILE, five, hostile, offline, report, server

_VOID = {"meta"}


class Reader(HTMLParser):
    """The elements and texts of a page; fails where elements are not closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], set(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


@pytest.mark.parametrize("name", list(ALL))
def test_every_report_makes_a_page_that_is_well_formed(name, tmp_path):
    page.write(ALL[name](), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert {"html", "head", "body", "table"} <= Reader(text).tags


@pytest.mark.parametrize("name", list(ALL))
def test_a_page_needs_no_network_and_no_scripts(name):
    text = page.html(ALL[name]())
    read = Reader(text)
    assert not read.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"}
    assert not any(key.startswith("on") or key in ("src", "href", "style") for key, _ in read.attributes)
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style


def test_every_text_of_a_file_is_escaped():
    text = page.html(hostile())
    read = Reader(text)
    assert "script" not in read.tags
    assert text.isascii() or all(c.isprintable() or c == "\n" for c in text)
    shown = "\n".join(read.texts)
    assert shown.count("<script>alert('1')</script>") > 20
    assert "diffoundry bench </title><script>" in shown


def test_all_tables_failures_and_the_command_are_there():
    made = five(notes=("the clock was low",))
    shown = "\n".join(Reader(page.html(made)).texts)
    for section in sections(made):
        for words in (section.title, *section.header, *(cell for row in section.rows for cell in row)):
            assert words in shown
    for title, why in failures(made):
        assert title in shown and why in shown
    for words in (
        made.command,
        made.request.prompt,
        made.bundle.sha256,
        "avx512_bf16",
        "the clock was low",
        "3,600 MHz",
    ):
        assert words in shown


def test_scenarios_are_there():
    assert "8: 14.1" in page.html(offline())
    assert "7.00 /s: 900 ms" in page.html(server())


def test_the_charts_have_a_bar_for_each_stage_and_a_dot_for_each_turn():
    text = page.html(five())
    bars = re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="[\d.]+" height="22" class="part (\w+)">', text)
    assert sorted(bars) == sorted(["before", "first_step", "steps", "after"] * 3 + ["merged"])
    assert text.count("<circle") == 4 * 25


def test_dark_and_print_are_provided_for():
    text = page.html(report())
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_an_interrupted_run_says_so():
    assert "was interrupted" in page.html(report(complete=False))
    assert "was interrupted" not in page.html(report())


def test_a_folder_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError):
        page.write(report(), tmp_path / "no" / "page.html")


def test_a_prompt_keeps_its_spaces():
    assert "a  b" in page.html(report(command="diffoundry bench x --prompt 'a  b'"))
    assert HOSTILE not in page.html(report(command=HOSTILE))
