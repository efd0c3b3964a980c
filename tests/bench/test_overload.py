"""More requests than can be drawn, and hours of them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import numpy as np
import pytest

import diffoundry
from diffoundry.bench.asking import Server
from diffoundry.bench.overload import overload
from diffoundry.bench.serving import Mix
from diffoundry.bench.soak import arrive
from diffoundry.common.errors import BenchError


def test_what_is_refused_comes_again_and_all_is_drawn(bundle_of):
    pipe = diffoundry.load(bundle_of("pico"), threads=1)
    coming = Mix(((64, 64),)).arrivals(16, 400.0, 1)
    gone, again = (overload(pipe, coming, 4, 1.5, obeys) for obeys in (0.0, 1.0))
    assert gone.asked == 16 and gone.refused > 0 and gone.came == 0
    assert sum(len(each) for each in gone.seconds.values()) == 16 - gone.refused
    assert again.came > 0 and again.asked == 16 + again.came
    assert sum(len(each) for each in again.seconds.values()) == 16


@pytest.mark.parametrize("name", ["overload", "soak", "serving"])
def test_a_bundle_that_is_not_there_is_one_line(tmp_path, monkeypatch, capsys, name):
    module = importlib.import_module(f"diffoundry.bench.{name}")
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path / "none")])
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "is not a folder" in line


def test_a_server_that_ends_by_itself_ends_the_soak():
    code = "import sys; print('listening on http://127.0.0.1:9', file=sys.stderr); sys.exit('no memory left')"
    server = Server([sys.executable, "-c", code])
    assert server._process.wait(60) == 1
    with pytest.raises(BenchError, match=r"the server ended by itself with status 1: .*no memory left"):
        arrive(server, None, None, [], 100.0, 60.0, np.random.default_rng(0))


@pytest.mark.slow
def test_a_short_soak(bundle_of, tmp_path):
    line = [
        "-m",
        "diffoundry.bench.soak",
        str(bundle_of("pico")),
        "--minutes",
        "0.2",
        "--json",
        tmp_path / "found.json",
    ]
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (tmp_path / "found.json").is_file(), done.stderr
    assert "wrong:" not in done.stdout and "left in the server: 0 waiting, 0 moving, 0 decoding" in done.stdout
