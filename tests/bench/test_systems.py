"""Processes that are asked: what is said of those that crash, hang or talk nonsense. They are real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffoundry.bench.systems import Process, command_of, running
from diffoundry.common.errors import BenchError

READY = 'print(\'{"ready": true, "versions": {"x": 1}}\', flush=True)\n'
SERVE = (
    "import json, os, signal, subprocess, sys, time\n"
    + READY
    + "for line in sys.stdin:\n    asked = json.loads(line)\n"
)


def process(script, timeout=20.0):
    return Process("peer", [sys.executable, "-c", script], timeout)


def is_running(pid):
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_answers_one_question_after_another():
    script = SERVE + "    print(json.dumps({'ok': True, **asked}), flush=True)\n"
    with running("peer", [sys.executable, "-c", script]) as peer:
        assert peer.versions == {"x": "1"} and 0 < peer.ready_s < 20
        assert peer.ask("draw", 20, seed=1) == {"ok": True, "do": "draw", "seed": 1}
        assert peer.ask("draw", 20, seed=2)["seed"] == 2


FAILURES = {
    "a refusal": ("print(json.dumps({'ok': False, 'error': 'no\\nsuch thing'}), flush=True)", "peer: no such thing"),
    "a refusal without a reason": ("print('{}', flush=True)", "peer: no reason given"),
    "no JSON": ("print('loading…', flush=True)", "no JSON object: 'loading…'"),
    "no object": ("print('[1]', flush=True)", r"no JSON object: '\[1\]'"),
    "bytes": (r"sys.stdout.buffer.write(b'\xff\x00\n'); sys.stdout.flush()", "no JSON object"),
    "an exception": ("raise ValueError('the model is broken')", "exit code 1: ValueError: the model is broken"),
    "an end": ("sys.exit(3)", "ended in 'draw' with exit code 3"),
    "a signal": ("os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV"),
    "no memory": ("os.kill(os.getpid(), signal.SIGKILL)", "it may have run out of memory"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_fails_is_one_line_that_names_it(case):
    script, expected = FAILURES[case]
    peer = process(f"{SERVE}    {script}\n")
    with pytest.raises(BenchError, match=expected) as failed:
        peer.ask("draw", 20)
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 400
    peer.kill()


def test_a_refusal_is_not_its_end():
    script = SERVE + "    print(json.dumps({'ok': asked['do'] == 'load', 'error': 'x'}), flush=True)\n"
    with running("peer", [sys.executable, "-c", script]) as peer:
        with pytest.raises(BenchError, match="peer: x"):
            peer.ask("draw", 20)
        assert peer.ask("load", 20)["ok"]


def test_what_hangs_is_ended_with_all_that_it_started(tmp_path):
    script = SERVE + (
        "    child = subprocess.Popen(['sleep', '100'])\n"
        f"    open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "    time.sleep(100)\n"
    )
    peer, start = process(script), time.monotonic()
    with pytest.raises(BenchError, match="gave no answer to 'draw' in 1 s and was ended"):
        peer.ask("draw", 1.0)
    assert time.monotonic() - start < 10
    time.sleep(0.2)
    assert not any(is_running(pid) for pid in (tmp_path / "pids").read_text().split())
    with pytest.raises(BenchError, match="has ended"):
        peer.ask("draw", 1.0)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import nothing_of_that_name", "ended in 'start' with exit code 1: ModuleNotFoundError"),
        ("print('{}')", "did not say that it is ready"),
        ("import time; time.sleep(100)", "gave no answer to 'start'"),
    ],
)
def test_what_does_not_start_is_told(script, expected):
    with pytest.raises(BenchError, match=expected):
        process(script, timeout=1.0)


def test_a_program_that_is_not_there_is_told():
    with pytest.raises(BenchError, match=r"peer does not start: /nowhere/python"):
        Process("peer", ["/nowhere/python"])


def test_ours_refuses_and_goes_on(bundle_of, tmp_path):
    message = {"bundle": str(bundle_of("pico")), "engine": None, "precision": "fp32", "threads": 1, "scheduler": None}
    draw = {
        "prompt": "a red star",
        "negative_prompt": None,
        "seed": 7,
        "steps": 2,
        "guidance": 7.5,
        "width": 64,
        "height": 64,
        "count": 1,
        "image": str(tmp_path / "image.npy"),
    }
    with running("diffoundry", command_of("diffoundry")) as ours:
        with pytest.raises(BenchError, match="nothing was loaded"):
            ours.ask("draw", 60, **draw)
        with pytest.raises(BenchError, match="is not a folder"):
            ours.ask("load", 60, **{**message, "bundle": str(tmp_path / "none")})
        assert ours.ask("load", 60, **message)["info"] == {"engine": "onnxruntime", "precision": "fp32"}
        with pytest.raises(BenchError, match="multiple of 8"):
            ours.ask("draw", 60, **{**draw, "width": 63})
        answer = ours.ask("draw", 60, **draw)
        ended = ours.end()
    stages = answer["stages"]
    told = stages["before"] + stages["first_step"] + sum(stages["steps"]) + stages["after"]
    assert told == pytest.approx(answer["seconds"], abs=1e-3)
    assert len(stages["steps"]) == 1 and len(stages["denoiser"]) == len(stages["loop"]) == 2
    assert answer["at"]["first_step"] < answer["at"]["end"]
    assert ended["peak_rss"] > 10 << 20 and ended["peak_gpu"] is None


def test_ours_ends_when_nobody_asks_any_more():
    done = subprocess.run(command_of("diffoundry"), stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["versions"]["diffoundry"]
