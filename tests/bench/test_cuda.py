"""The benchmark of `onnxruntime:cuda`, run through on the simulated GPU: that it measures, not how long."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from diffoundry.bench import cuda
from diffoundry.calibration.build import build
from diffoundry.tests.conftest import PICO


@pytest.fixture(scope="module")
def run(bundle_of, tmp_path_factory):
    """Few small runs of pico, whose bundle has its graphs for CUDA."""
    folder = tmp_path_factory.mktemp("bench")
    bundle = shutil.copytree(bundle_of("pico"), folder / "pico.bundle")
    build(bundle, engine="onnxruntime:cuda")
    return cuda.Run(str(PICO), str(bundle), side=64, steps=2, runs=2, device="cuda", scratch=folder, many=20)


@pytest.fixture(autouse=True)
def _sessions(simulated_sessions):
    """Sessions on the simulated GPU."""


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_call_is_held_against_the_reference_and_captured(run, capsys):
    import torch
    from diffusers import UNet2DConditionModel

    feeds = {name: torch.from_numpy(array) for name, array in cuda._feeds(run).items()}
    unet = UNet2DConditionModel.from_pretrained(PICO / "unet").eval()
    with torch.no_grad():
        exact = unet(feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"], return_dict=False)[0]
    np.save(run.scratch / "reference.npy", exact.numpy())
    cuda.call_ours(run)
    rows = printed(capsys)
    assert [row["what"] for row in rows] == ["ours, node by node", "ours, captured"]
    assert all(row["db"] > 100 and row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in rows)


@pytest.mark.slow
def test_pictures_batches_shapes_and_memory_are_measured(run, capsys, monkeypatch):
    cuda.pictures_ours(run)
    (row,) = printed(capsys)
    assert row["captured"][:1] == ["2 steps of 2x4x8x8"] and row["loop_ms"] > 0 and row["used_gib"] >= 0
    cuda.shapes(run)
    (row,) = printed(capsys)
    assert row["worst_over_alone"] >= row["over_alone"] > 0
    cuda.memory(run)
    (row,) = printed(capsys)
    assert row["mib"] == 0
