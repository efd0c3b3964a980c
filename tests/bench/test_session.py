"""A system that is loaded draws what was asked for, and says what is wrong with its answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from diffoundry.bench.pictures import difference
from diffoundry.bench.report import Settings
from diffoundry.bench.session import Session, Task, first_latents, session
from diffoundry.bench.systems import running
from diffoundry.common.errors import BenchError
from diffoundry.families import open_bundle
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.pipeline import load
from diffoundry.runtime.request import Request

SETTINGS = Settings(
    prompt="a small white ring",
    negative_prompt="a star",
    width=72,
    height=64,
    steps=3,
    guidance=4.0,
    scheduler="euler",
    seed=11,
    count=1,
    engine="onnxruntime",
    precision="fp32",
    threads=2,
    scenario="single",
    turns=1,
    cold=0,
)


@pytest.fixture
def task(bundle_of, tmp_path):
    return Task(open_bundle(bundle_of("pico")), None, SETTINGS, tmp_path, (4, 8, 9))


def test_ours_draws_what_was_asked_for(task, bundle_of):
    asked = SETTINGS
    request = Request(
        asked.prompt,
        asked.negative_prompt,
        steps=asked.steps,
        guidance=Guidance(asked.guidance),
        scheduler=asked.scheduler,
        seed=asked.seed,
        count=2,
        width=asked.width,
        height=asked.height,
    )
    expected = np.stack([np.asarray(image) for image in load(bundle_of("pico"), threads=2).generate(request).images])
    with session("diffoundry", task, "fp32") as ours:
        drawn = ours.draw(2)
        assert np.array_equal(ours.picture(2), expected)
        assert ours.info["engine"] == "onnxruntime" and ours.convert_s == 0
        (step, *_) = [call for call in drawn.calls if call["component"] == "unet"]
        assert step["shapes"]["sample"] == [4, 4, 8, 9]
        start = ours.cold(drawn)
        with pytest.raises(BenchError, match="its picture is"):
            ours.picture(1)
    assert 0 < start.import_s < start.load_s < start.first_step_s < start.first_image_s


def test_peers_get_the_latents_of_torch(task):
    import torch

    expected = [torch.randn(1, 4, 8, 9, generator=torch.Generator().manual_seed(11 + i)) for i in range(2)]
    assert np.allclose(first_latents(11, 2, (4, 8, 9)), torch.cat(expected).numpy(), atol=1e-6)
    message = task.draw_message(2, Path("image.npy"))
    assert np.array_equal(np.load(message["latents"]), first_latents(11, 2, (4, 8, 9)))


def test_peers_are_told_the_class_behind_the_name_of_a_scheduler(task):
    message = task.load_message("diffusers", "bf16")
    assert (message["scheduler"], message["scheduler_class"]) == ("euler", "EulerDiscreteScheduler")
    assert (message["precision"], message["engine"], message["device"]) == ("bf16", None, "cpu")


ANSWERS = {
    "no seconds": ({"ok": True}, "without its seconds"),
    "seconds that cannot be": ({"ok": True, "seconds": -1}, "without its seconds"),
    "stages that cannot be": ({"ok": True, "seconds": 1, "stages": {"steps": ["x"]}}, "stages that cannot be"),
    "a refusal": ({"ok": False, "error": "out of memory"}, "peer: out of memory"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_that_cannot_be_are_refused(case, task, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answer, expected = ANSWERS[case]
    script = (
        "import json, sys\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        f"    answer = {answer!r} if json.loads(line)['do'] == 'draw' else {{'ok': True}}\n"
        "    print(json.dumps(answer), flush=True)\n"
    )
    with running("peer", [sys.executable, "-c", script]) as process:
        peer = Session(process, task, "fp32")
        with pytest.raises(BenchError, match=expected):
            peer.draw(1)
        with pytest.raises(BenchError, match="its picture cannot be read"):
            peer.picture(1)


def test_pictures_are_held_against_each_other():
    reference = np.full((1, 8, 8, 3), 100, np.uint8)
    assert difference(reference, reference) == (None, 0)
    found = reference.copy()
    found[0, 0, 0, 0] = 90
    psnr, levels = difference(found, reference)
    assert levels == 10 and psnr == pytest.approx(10 * np.log10(255**2 / (100 / found.size)))
    json.dumps([psnr, levels])
