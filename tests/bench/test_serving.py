"""`python -m diffoundry.bench.serving`: mixed load as a table, a file and a drawing."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image

from diffoundry.bench.serving import HEAD, WAYS, main


@pytest.fixture
def serving(monkeypatch, capsys, tmp_path):
    """Run the command; its exit code, what it printed and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["serving", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


def test_what_was_kept_is_shown_and_drawn(serving, tmp_path):
    rows = [
        {"load": load, "rate": (load or 0) * 20, "way": way, "images_per_s": 8.5 + i,
         "latency_ms": {"4": {"p50": 30.0, "p99": 83.0 * 9**i}, "50": {"p50": 300.0, "p99": 800.0}}}
        for load in (None, 0.5) for i, way in enumerate(WAYS)
    ]  # fmt: skip
    (tmp_path / "load.json").write_text(json.dumps({"measured": rows}), encoding="utf-8")
    code, table, said = serving("--json", "load.json", "--plot", "load.png")
    lines = table.splitlines()
    assert (code, said, len(lines)) == (0, "", 8) and lines[0] == f"| {' | '.join(HEAD)} |"
    assert lines[2] == "| all at once | stepped | 30 | 83 | – | 300 | 800 | 8.50 |"
    assert lines[6] == "| 50% of 20.0/s | batched | 30 | 747 | – | 300 | 800 | 9.50 |"
    with Image.open(tmp_path / "load.png") as drawn:
        pixels = drawn.convert("RGB").getcolors(1 << 20)
    assert drawn.format == "PNG" and {(0, 0x44, 0x88), (0xBB, 0x55, 0x66)} < {colour for _, colour in pixels}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name a bundle to measure"),
        (("nowhere",), "nowhere"),
        (("x", "--turns", "0"), "1 or more"),
        (("x", "--sizes", "big"), "found 'big'"),
        (("x", "--plot", "load.gif"), "ends in .png or .svg"),
        (("x", "--json", "nowhere/load.json"), "the folder nowhere does not exist"),
        (("--json", "none.json"), "the measurement is missing: none.json"),
        (("--json", "other.json"), "other.json is no measurement of this command"),
    ],
)
def test_what_cannot_be_done_is_one_line(serving, tmp_path, arguments, words):
    (tmp_path / "other.json").write_text('{"measured": [{"load": 1}]}', encoding="utf-8")
    code, table, said = serving(*arguments)
    assert (code, table) == (1, "") and said.startswith("Error: ") and words in said and said.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name != "other.json"]


@pytest.mark.slow
def test_every_load_is_drawn_in_every_way(serving, bundle_of, tmp_path):
    code, table, said = serving(bundle_of("pico"), "--requests", "30", "--turns", "1", "--json", "a.json")
    assert code == 0 and len(table.splitlines()) == 2 + 4 * len(WAYS), said
    found = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert {each["way"] for each in found["measured"]} == set(WAYS) and found["requests"] == 30
    for each in found["measured"]:
        assert 0 < each["latency_ms"]["4"]["p50"] <= each["latency_ms"]["4"]["p99"] and each["images_per_s"] > 0
    assert serving("--json", "a.json")[1] == table
