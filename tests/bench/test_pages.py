"""docs/benchmarks.md is what the command makes of the reports beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from diffoundry.bench.pages import page
from diffoundry.bench.report import Gpu, save
from diffoundry.tests.bench.reports import ALL, five, hostile, report, server
from diffoundry.tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "diffoundry.bench.pages", *arguments], capture_output=True, text=True, encoding="utf-8"
    )


def test_the_page_of_the_documentation_is_what_the_command_writes(tmp_path):
    (tmp_path / "benchmarks").symlink_to(DOCS / "benchmarks")
    done = command(*sorted((DOCS / "benchmarks").glob("*.json")), "-o", tmp_path / "benchmarks.md")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "benchmarks.md").read_text("utf-8") == (DOCS / "benchmarks.md").read_text("utf-8")


def test_the_order_of_the_files_does_not_matter(tmp_path):
    save(five(), tmp_path / "b.json")
    save(server(), tmp_path / "a.json")
    pages = []
    for names in (("a", "b"), ("b", "a")):
        assert command(*(tmp_path / f"{name}.json" for name in names), "-o", tmp_path / "p.md").returncode == 0
        pages.append((tmp_path / "p.md").read_bytes())
    assert pages[0] == pages[1]
    assert pages[0].decode().index("p/a.json") < pages[0].decode().index("p/b.json")


def test_what_is_kept_by_hand_is_put_in_as_it_is(tmp_path):
    kept = "## Kept\n\n| a | b |\n|---|---|\n| `x` | <b>y</b> |\n"
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "other.md").write_text(kept)
    assert command("-o", tmp_path / "p.md").returncode == 0
    assert (tmp_path / "p.md").read_text().endswith(kept)


@pytest.mark.parametrize("name", list(ALL))
def test_every_report_makes_tables_whose_rows_fit(name):
    text = page({"a.json": ALL[name]()})
    columns = None
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        found = len(re.findall(r"(?<!\\)\|", line))
        assert columns in (None, found), line
        columns = found
    assert text == page({"a.json": ALL[name]()})


def test_ratios_pictures_shares_and_failures_are_told():
    made = five()
    text = page({"a.json": made})
    for words in ("4.02 (3.98 to 4.14)", "31.4 dB, 87 levels †", "72 %", "499 ms", "2026-03-01", "diffusers 1.2.3"):
        assert words in text
    assert "OpenVINO GenAI 2025.4 failed: RuntimeError" in text
    assert f"```sh\n{made.command}\n```" in text


def test_several_reports_have_an_overview():
    text = page({"a.json": five(), "b.json": server()})
    assert "| 101 ms | 2.20 | 4.02 | failed | 3.49 † |" in text
    assert "| 101 ms | – | 4.02 | – | – |" in text


def test_a_gpu_is_not_denied():
    assert "Nothing on this page says how fast anything is on a GPU" in page({"a.json": report()})
    on_gpu = report(machine=replace(five().machine, gpu=Gpu("H100", 80 << 30)))
    assert "Nothing on this page" not in page({"a.json": on_gpu})


def test_texts_of_files_are_no_markup():
    text = page({"a.json": hostile()})
    outside = re.sub(r"^(`{3,})sh\n.*?^\1$", "", text, flags=re.M | re.S)
    outside = re.sub(r"<!-- made by: .* -->|\[report\]\(<.*?>\)", "", outside)
    assert not re.search(r"(?<!\\)[<>`$]", outside)
    assert all(line.isprintable() for line in text.splitlines())


def test_a_file_that_is_no_report_is_one_line(tmp_path):
    (tmp_path / "a.json").write_text('{"schema_version": 99}')
    (tmp_path / "b.json").write_text("[]")
    for name in ("a.json", "b.json", "none.json"):
        done = command(tmp_path / name, "-o", tmp_path / "p.md")
        assert done.returncode == 1
        assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1
        assert name in done.stderr
    assert not (tmp_path / "p.md").exists()
