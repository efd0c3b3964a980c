"""`lower`: typed components of pico held against float32."""

from __future__ import annotations

import shutil

import pytest

from diffoundry.bundle import Bundle
from diffoundry.calibration import Scan, lower

CAPTIONS = (
    "a large red star at the left on a navy background",
    "a small green circle at the top on a white background",
)


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def lowered(request, bundle_of, tmp_path_factory):
    root = shutil.copytree(bundle_of("pico"), tmp_path_factory.mktemp(request.param) / "pico.bundle")
    bundle = Bundle.open(root)
    return bundle, *lower(bundle, request.param, scan=Scan(CAPTIONS))


def test_the_images_are_within_the_budget(lowered):
    _, typed, report = lowered
    assert set(typed) == {"text_encoder", "unet", "vae_encoder", "vae_decoder"}
    assert report["psnr_db"] == min(prompt["psnr_db"] for prompt in report["prompts"])
    assert 35 <= report["psnr_db"] < 90
