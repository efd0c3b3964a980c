"""What peers convert is kept while it can be of use, and no longer."""

from __future__ import annotations

import os
import time

import pytest

from diffoundry.bench.converted import UNUSED_DAYS, folder_of


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffoundry" / "bench" / "models"


def _kept(checkpoint, source="a", name="openvino-genai", precision="fp32"):
    folder = folder_of(name, precision, str(checkpoint), {"hash": source})
    (folder / "model.bin").write_bytes(b"weights")
    return folder


def test_a_model_is_found_again(tmp_path):
    folder = _kept(tmp_path)
    assert _kept(tmp_path) == folder
    assert (folder / "model.bin").read_bytes() == b"weights"


def test_what_differs_stands_beside_it(tmp_path, cache):
    other = tmp_path / "other"
    other.mkdir()
    made = {_kept(tmp_path), _kept(tmp_path, precision="bf16"), _kept(tmp_path, name="compile"), _kept(other)}
    assert set(cache.iterdir()) == made
    assert len(made) == 4


def test_the_model_of_a_checkpoint_that_is_gone_goes(tmp_path, cache):
    gone = tmp_path / "gone"
    gone.mkdir()
    _kept(gone)
    gone.rmdir()
    assert {_kept(tmp_path)} == set(cache.iterdir())


def test_the_model_of_a_checkpoint_that_has_changed_goes(tmp_path, cache):
    bf16 = _kept(tmp_path, precision="bf16")
    _kept(tmp_path)
    assert {_kept(tmp_path, "changed"), bf16} == set(cache.iterdir())


def test_what_is_out_of_use_goes(tmp_path, cache):
    other = tmp_path / "other"
    other.mkdir()
    long_ago = time.time() - (UNUSED_DAYS + 1) * 86400
    unknown = cache / "compile-fp32-0123456789abcdef"
    for folder in (_kept(other), unknown):
        folder.mkdir(exist_ok=True)
        for each in (folder / "of.json", folder):
            if each.exists():
                os.utime(each, (long_ago, long_ago))
    assert {_kept(tmp_path)} == set(cache.iterdir())


def test_use_keeps_a_model(tmp_path, cache):
    folder = _kept(tmp_path)
    long_ago = time.time() - (UNUSED_DAYS + 1) * 86400
    os.utime(folder / "of.json", (long_ago, long_ago))
    _kept(tmp_path)
    _kept(tmp_path, precision="bf16")
    assert (folder / "model.bin").exists()
