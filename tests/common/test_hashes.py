"""Hashes that are remembered: for what was not touched, and for nothing else."""

from __future__ import annotations

import os
import time

import pytest

from diffoundry.bundle import Bundle
from diffoundry.common import hashes
from diffoundry.common.errors import BundleError
from diffoundry.common.files import sha256_file
from diffoundry.common.hashes import sha256_known

pytestmark = pytest.mark.skipif(os.name == "nt", reason="every file is read there")


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The paths that were read; any file is a large one, and settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LARGE_BYTES", 1)
    monkeypatch.setattr(hashes, "_SETTLED_S", -1.0)
    paths = []
    monkeypatch.setattr(hashes, "sha256_file", lambda path: paths.append(path) or sha256_file(path))
    return paths


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


def test_an_untouched_file_is_read_once(path, read):
    assert [sha256_known(path) for _ in range(3)] == [sha256_file(path)] * 3
    assert read == [path]


CHANGES = {
    "other bytes": lambda path: path.write_bytes(b"WEIGHTS"),
    "cut": lambda path: path.write_bytes(b"weight"),
    "written in place with its time set back": lambda path: in_place(path),
    "another file in its place": lambda path: replaced(path),
}


def in_place(path):
    times = path.stat()
    time.sleep(0.02)  # the clock of a file system goes in ticks
    with path.open("r+b") as file:
        file.write(b"W")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(path):
    times, other = path.stat(), path.with_name("other")
    other.write_bytes(b"WEIGHTS")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("case", CHANGES)
def test_a_file_that_was_changed_is_read_again(case, path, read):
    before = sha256_known(path)
    CHANGES[case](path)
    assert sha256_known(path) == sha256_file(path) != before


def test_a_file_that_was_just_written_is_not_remembered(path, read, monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED_S", 60.0)
    assert sha256_known(path) == sha256_known(path)
    assert read == [path, path]


def test_a_small_file_is_not_remembered(path, read, monkeypatch):
    monkeypatch.setattr(hashes, "LARGE_BYTES", 8)
    assert sha256_known(path) == sha256_known(path)
    assert read == [path, path]


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"state": [], "sha256": "00"}', "folder"])
def test_a_damaged_memory_is_none(damage, path, read):
    wanted = sha256_known(path)
    record = hashes._record(path)
    record.unlink()
    record.mkdir() if damage == "folder" else record.write_text(damage)
    assert sha256_known(path) == wanted and len(read) == 2


def test_a_cache_that_cannot_be_written_is_no_error(path, read, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sha256_known(path) == sha256_known(path)
    assert read == [path, path]


def test_a_user_without_a_home_is_no_error(path, read, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(hashes.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    assert sha256_known(path) == sha256_known(path)
    assert read == [path, path]


def test_what_is_missing_is_told(tmp_path, read):
    with pytest.raises(OSError, match="No such file"):
        sha256_known(tmp_path / "nothing")


def test_verify_reads_and_a_load_remembers(copied, read):
    bundle = Bundle.open(copied)
    name = "unet/model.onnx"
    bundle.check([name], known=True)
    bundle.check([name], known=True)
    assert read == [bundle.path(name)]
    bundle.check([name])
    in_place(bundle.path(name))
    for known in (True, False):
        with pytest.raises(BundleError, match=r"model\.onnx was changed after the bundle was built"):
            bundle.check([name], known=known)
