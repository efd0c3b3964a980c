"""Turns against other systems. In place of a peer stands a program of which it is known what it does."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import pytest

from diffoundry.bench import peers
from diffoundry.bench.bench import measure
from diffoundry.bench.options import Options
from diffoundry.bench.systems import command_of
from diffoundry.common.errors import BenchError
from diffoundry.tests.conftest import PICO

OTHER = """
import json, sys, time
import numpy as np
print(json.dumps({"ready": True, "versions": {"other": "1"}}), flush=True)
drawn = 0
for line in sys.stdin:
    asked = json.loads(line)
    answer = {"ok": True}
    if asked["do"] == "load":
        answer |= {"seconds": {"load": 0.1}, "info": {"threads": asked["threads"]}}
    if asked["do"] == "draw":
        drawn += 1
        if drawn > int(sys.argv[1]):
            raise MemoryError("no more")
        np.save(asked["image"], np.zeros((asked["count"], asked["height"], asked["width"], 3), np.uint8))
        time.sleep(0.2)
        answer |= {"seconds": 0.2, "stages": {"first_step": 0.1, "steps": [0.025] * (asked["steps"] - 1)}}
    if asked["do"] == "end":
        answer |= {"peak_rss": 1 << 20, "peak_gpu": None}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def options(bundle_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Options(bundle_of("pico"), PICO, ("diffusers",), steps=4, turns=2, cold=1, threads=1)


def measured(options, monkeypatch, command):
    monkeypatch.setattr(peers, "command", command)
    kept = []
    report = measure(options, kept.append)
    assert kept == [report] and report.complete
    return report


@pytest.mark.slow
def test_ours_against_itself_draws_the_same_picture(options, monkeypatch):
    report = measured(options, monkeypatch, lambda name: command_of("diffoundry"))
    ours, theirs = report.systems
    assert (theirs.name, theirs.error, theirs.max_levels, theirs.ratio.pairs) == (
        "diffusers",
        None,
        None,
        tuple(a.seconds / b.seconds for a, b in zip(theirs.turns, ours.turns, strict=True)),
    )
    assert report.reference == "diffusers, fp32" and (ours.psnr_db, ours.max_levels) == (None, 0)
    assert 0.2 < theirs.ratio.median < 5 and 0.2 < theirs.ratio_step.median < 5
    assert len(theirs.cold) == 1 and ours.ratio is None and not ours.changes_picture


def test_another_picture_is_marked_and_what_is_told_is_kept(options, monkeypatch):
    options = replace(options, versus=("sdcpp",))
    report = measured(options, monkeypatch, lambda name: [sys.executable, "-c", OTHER, "99"])
    ours, theirs = report.systems
    assert report.reference == "diffoundry, fp32" and ours.max_levels is None
    assert theirs.changes_picture and theirs.psnr_db < 30 and theirs.max_levels > 1
    assert theirs.versions == {"other": "1"} and theirs.info["threads"] == 1 and theirs.peak_rss_bytes == 1 << 20
    assert theirs.cold[0].first_step_s is None and theirs.turns[0].seconds == 0.2
    assert theirs.ratio_step.pairs == tuple(0.025 / sorted(turn.stages.steps)[1] for turn in ours.turns)


@pytest.mark.parametrize(
    ("draws", "turns", "message"),
    [
        pytest.param(0, 0, "MemoryError", marks=pytest.mark.slow),
        (4, 1, "ended in 'draw' with exit code 1: MemoryError"),
    ],
)
def test_one_that_fails_is_a_row_that_keeps_what_it_has(options, monkeypatch, draws, turns, message):
    options = replace(options, versus=("diffusers", "sdcpp"))

    def command(name):
        return command_of("diffoundry") if name == "sdcpp" else [sys.executable, "-c", OTHER, str(draws)]

    report = measured(options, monkeypatch, command)
    failed, other = report.system("diffusers"), report.system("sdcpp")
    assert message in failed.error and len(failed.turns) == turns
    assert (failed.ratio is None) == (turns == 0)
    assert other.error is None and len(other.turns) == 2 and len(report.system("diffoundry").turns) >= 2


@pytest.mark.slow
def test_one_that_is_missing_or_cannot_do_the_precision_says_so(options, monkeypatch):
    def command(name):
        raise BenchError("its environment is missing")

    report = measured(options, monkeypatch, command)
    assert report.system("diffusers").error == "its environment is missing"
    assert report.reference == "diffoundry, fp32" and len(report.system("diffoundry").turns) == 2
    monkeypatch.setattr(peers, "precisions", lambda name: ("bf16",))
    report = measured(options, monkeypatch, command)
    assert report.system("diffusers").error == "diffusers runs in bf16, not in fp32"


def test_where_nothing_was_set_up_each_row_says_how(command, bundle_of, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    line = ("bench", bundle_of("pico"), "--turns", "1", "--cold", "0", "--steps", "2", "--checkpoint", PICO)
    done = command(*line, "--vs", ",".join(peers.PEERS), env=environment)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for name in peers.PEERS:
        assert f"diffoundry bench --setup {name}" in words
