"""The tables of the documentation are put into their pages by a script."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffoundry.tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def write(page, table, folder):
    (folder / "table").write_text(table)
    (folder / "page.md").write_bytes(page.read_bytes())
    line = [sys.executable, DOCS / "tables.py", folder / "page.md", folder / "table"]
    done = subprocess.run(line, capture_output=True, text=True)
    return done.returncode, (folder / "page.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["parity.md", "schedulers.md"])
def test_a_table_takes_the_place_of_the_old_one(name, tmp_path):
    page = (DOCS / name).read_text("utf-8")
    before, marker, rest = page.partition("<!-- made by: ")
    old = rest.partition("-->\n```\n")[2].partition("```\n")[0]
    assert write(DOCS / name, old, tmp_path) == (0, page)
    assert write(DOCS / name, "new  1 %\n", tmp_path) == (0, page.replace(old, "new  1 %\n"))


def test_a_table_that_is_no_block(tmp_path):
    page = (DOCS / "serve.md").read_text("utf-8")
    old = page.partition("<!-- made by: ")[2].partition("-->\n")[2].partition("\n\n")[0] + "\n"
    assert old.startswith("| load") and write(DOCS / "serve.md", old, tmp_path) == (0, page)
    assert write(DOCS / "serve.md", "| new \\1 |\n", tmp_path) == (0, page.replace(old, "| new \\1 |\n"))


def test_a_page_without_a_table_is_left_alone(tmp_path):
    code, page = write(DOCS / "pico.md", "new\n", tmp_path)
    assert code == 1
    assert page == (DOCS / "pico.md").read_text("utf-8")
