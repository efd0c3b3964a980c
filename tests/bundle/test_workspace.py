"""Where a bundle takes its place: targets that cannot be renamed, what is in the way, and work that is never lost."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from copy import copy
from pathlib import Path

import pytest

import diffoundry
from diffoundry.bundle import Bundle, workspace
from diffoundry.bundle.workspace import (
    STAGES,
    check_target,
    old_folder,
    prepare,
    recover,
    swap,
    tidy,
    work_folder,
    working,
)
from diffoundry.common.errors import BundleError, DiffoundryError, EngineError
from diffoundry.common.files import exclusive, is_marked, mark, remove

LONG = "b" * 252
"""A name that the file system takes, while it refuses `.<name>.old`: such a folder cannot be put aside."""


def filled(target: Path, bundle: Path, word: str = "new") -> Path:
    """The work folder of `target` with a finished bundle and its stages in it."""
    prepare(target)
    work = work_folder(target)
    shutil.copytree(bundle, work, dirs_exist_ok=True, copy_function=os.link)
    (work / STAGES).mkdir()
    (work / STAGES / "unet.json").write_text("{}")
    (work / "engines").mkdir()
    (work / "engines" / "timing.cache").write_text(word)
    return work


def whole(target: Path, word: str = "new") -> None:
    Bundle.open(target).check()
    assert (target / "engines" / "timing.cache").read_text() == word
    assert not any(path.name.startswith(".") for path in target.iterdir())
    assert [path.name for path in target.parent.iterdir() if path.name.startswith(".")] == []


TARGETS = ("b bundle", f"{LONG} bundle", "b new", "b empty", f"{LONG} empty", "cwd empty", "cwd bundle")
stopped = pytest.mark.parametrize(
    "target", [*TARGETS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in TARGETS[2:])], indirect=True
)


@pytest.fixture(params=TARGETS)
def target(request, bundle_of, tmp_path, monkeypatch):
    """A place for a bundle: renamed into, or in a folder that cannot be renamed, empty or with an older bundle."""
    name, before = request.param.split()
    path = tmp_path / "home" / ("b" if name == "cwd" else name)
    path.parent.mkdir()
    if before == "empty":
        path.mkdir()
    if before == "bundle":
        shutil.copytree(bundle_of("pico"), path)
    if name == "cwd":
        monkeypatch.chdir(path)
    return path


def test_a_bundle_takes_its_place(target, bundle_of, tmp_path):
    inode = target.stat().st_ino if target.exists() else None
    check_target(target, "x")
    work = filled(target, bundle_of("pico"))
    renamed = work.parent == target.parent
    assert renamed == (target.name == "b" and Path.cwd() != target)
    swap(target)
    whole(target)
    assert inode is None or (target.stat().st_ino == inode) != renamed
    recover(target)
    whole(target)


class Killed(BaseException):
    """As a kill: nothing of ours handles it."""


@stopped
def test_a_stop_while_the_old_one_is_removed_is_mended(target, bundle_of, monkeypatch):
    """Each removal in turn is the last before a kill: the new bundle stands whole, before and after it is mended."""
    real, stops, done = workspace.remove, 0, False
    while not done:
        filled(target, bundle_of("pico"), f"new {stops}")
        left = [stops]

        def remove(path, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            real(path)

        monkeypatch.setattr(workspace, "remove", remove)
        done = True
        try:
            swap(target)
        except Killed:
            done = False
        monkeypatch.setattr(workspace, "remove", real)
        Bundle.open(target).check()
        recover(target)
        prepare(target)
        tidy(target)
        Bundle.open(target).check()
        assert (target / "engines" / "timing.cache").read_text() == f"new {stops}"
        assert (target / "reports" / "stages" / "unet.json").exists()
        shutil.rmtree(work_folder(target), ignore_errors=True)
        stops += 1
    assert stops > 2


@stopped
def test_a_stop_at_any_point_is_mended(target, bundle_of, monkeypatch):
    """Each rename in turn is the last that is made before a kill; what stands there is then never a mixture."""
    real = Path.rename

    stops = 0
    while True:
        filled(target, bundle_of("pico"), f"new {stops}")
        left = [stops]

        def rename(path, to, left=left):
            if not left[0]:
                raise Killed
            left[0] -= 1
            return real(path, to)

        monkeypatch.setattr(Path, "rename", rename)
        try:
            swap(target)
            done = True
        except Killed:
            done = False
        monkeypatch.setattr(Path, "rename", real)
        if done:
            break
        if (target / "bundle.json").exists():
            Bundle.open(target).check()
        recover(target)
        if (target / "bundle.json").exists():
            Bundle.open(target).check()
        shutil.rmtree(work_folder(target), ignore_errors=True)
        stops += 1
    whole(target, f"new {stops}")
    assert stops > 0


def test_a_swap_that_fails_keeps_the_work(bundle_of, tmp_path):
    """Somebody puts a file of theirs where the bundle is to come, while it is made."""
    target = tmp_path / "b"
    work = filled(target, bundle_of("pico"))
    target.write_text("a thesis")
    with pytest.raises(DiffoundryError, match=r"no bundle.*finished bundle is kept in .*\.b\.part"):
        swap(target)
    tidy(target)
    assert target.read_text() == "a thesis"
    assert is_marked(work) and (work / STAGES / "unet.json").exists()
    target.unlink()
    swap(target)
    whole(target)


@pytest.mark.parametrize("error", [EngineError("int8 is slow: leave it out"), OSError(errno.ENOSPC, "x", "unet.onnx")])
def test_an_error_says_where_finished_stages_are(tmp_path, error):
    def fails(record):
        with working(tmp_path / "b", lambda: None) as (work, _):
            if record:
                (work / STAGES).mkdir(exist_ok=True)
                (work / STAGES / record).write_text("{}")
            raise copy(error)

    for _ in range(2):  # the second finds what the first left
        with pytest.raises(DiffoundryError, match=r"(out|unet).*; what was finished is kept in .*b\.part for the next"):
            fails("unet.json")
        assert (tmp_path / ".b.part" / STAGES / "unet.json").exists()
    shutil.rmtree(tmp_path / ".b.part")
    with pytest.raises(DiffoundryError) as raised:
        fails(None)
    assert "kept" not in str(raised.value) and not any(tmp_path.iterdir())


def test_files_that_came_while_a_bundle_was_made_are_not_lost(bundle_of, tmp_path):
    target = Path(shutil.copytree(bundle_of("pico"), tmp_path / "b"))
    filled(target, bundle_of("pico"))
    (target / "unet" / "thesis.txt").write_text("years of work")
    with pytest.raises(DiffoundryError, match=r"unet/thesis\.txt.*would be lost.*is kept"):
        swap(target)
    assert (target / "unet" / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["unet/thesis.txt", "reports/notes.md", "engines/mine/x", "tokenizer/.x"])
def test_files_in_the_folders_of_a_bundle_are_not_lost_either(called, checkpoint_of, copied, name):
    (copied / name).parent.mkdir(parents=True, exist_ok=True)
    (copied / name).write_text("years of work")
    done = called("compile", checkpoint_of("pico"), "-o", copied)
    assert done.returncode == 1 and name in done.stderr and "would be lost" in done.stderr
    assert (copied / name).read_text() == "years of work"
    (copied / name).rename(copied.parent / "away")  # the remedy
    check_target(copied, "x")


@pytest.mark.parametrize("name", [".b.part", ".b.old"])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "pipe"])
def test_what_has_the_name_of_a_work_folder_is_not_touched(called, checkpoint_of, tmp_path, name, kind):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("x")
    if kind == "folder":
        outside.rename(tmp_path / name)
    elif kind == "file":
        (tmp_path / name).write_text("x")
    elif kind == "link":
        (tmp_path / name).symlink_to(outside)
    else:
        os.mkfifo(tmp_path / name)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = called("compile", checkpoint_of("pico"), "-o", tmp_path / "b")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and name in done.stderr and "move it away" in done.stderr
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("inner", [STAGES, "engines", "unet", ".checkpoint"])
def test_a_work_folder_with_a_link_out_is_not_used(called, checkpoint_of, tmp_path, inner):
    outside, work = tmp_path / "outside", tmp_path / ".b.part"
    outside.mkdir()
    (outside / "x").write_text("x")
    work.mkdir()
    mark(work)
    (work / inner).symlink_to(outside)
    done = called("compile", checkpoint_of("pico"), "-o", tmp_path / "b")
    assert done.returncode == 1 and "through a link" in done.stderr
    assert (outside / "x").read_text() == "x" and len(list(outside.iterdir())) == 1


def test_a_lock_that_is_a_link_or_a_pipe_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with exclusive(tmp_path / "b"):
        (lock,) = tmp_path.glob("*.lock")
    assert not lock.exists()  # they do not gather
    lock.symlink_to(tmp_path / "made")
    with pytest.raises(DiffoundryError, match="in the way of a lock: remove it"), exclusive(tmp_path / "b"):
        pass
    assert not (tmp_path / "made").exists()
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(DiffoundryError, match="in the way of a lock: remove it"), exclusive(tmp_path / "b"):
        pass
    lock.unlink()
    with exclusive(tmp_path / "b"):
        pass


def test_what_is_removed_may_be_without_permission_to_write(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "x").write_text("x")
    for each in (folder, folder.parent):
        each.chmod(0o500)
    remove(folder.parent)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("/", "is a root folder: choose an --output below it"),
        ("b" * 300, "File name too long"),
        (LONG, "File name too long"),
        ("loop", "is no path to a folder: choose another --output"),
        ("file", "exists and is no bundle"),
        ("file/b", "does not exist: make it"),
        ("full", "choose another --output, such as"),
        ("socket", "exists and is no bundle"),
    ],
)
def test_targets_that_cannot_be(called, checkpoint_of, tmp_path, output, words, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "socket")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = called("compile", checkpoint_of("pico"), "-o", output if output == "/" else tmp_path / output)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_journal_that_names_what_is_not_there_to_move_is_refused(bundle_of, tmp_path):
    target = tmp_path / LONG
    target.mkdir()
    work = filled(target, bundle_of("pico"))
    (work / workspace._JOURNAL).write_text('{"leaving": ["../x"], "coming": []}')
    (tmp_path / "x").write_text("x")
    with pytest.raises(DiffoundryError, match=r"is damaged: remove"):
        recover(target)
    assert (tmp_path / "x").exists()


def test_what_was_made_beside_goes_on_inside(bundle_of, tmp_path, monkeypatch):
    """The target becomes one that cannot be renamed between two runs."""
    target = tmp_path / "b"
    filled(target, bundle_of("pico"))
    target.mkdir()
    monkeypatch.chdir(target)
    prepare(target)
    assert work_folder(target).parent == target and (work_folder(target) / STAGES / "unet.json").exists()
    swap(target)
    whole(target)


def test_the_bundle_of_a_target_that_leads_out_of_itself_is_refused(copied, tmp_path):
    (copied / "unet/model.onnx").rename(tmp_path / "m")
    (copied / "unet/model.onnx").symlink_to(tmp_path / "m")
    with pytest.raises(BundleError, match="through a link"):
        check_target(copied, "x")
    assert not os.path.lexists(old_folder(copied))


MOUNT = """
mount -t tmpfs none "$1" && "$2" -m diffoundry compile "$3" -o "$1" --tasks txt2img && "$2" -m diffoundry compile "$3" \
-o "$1" --tasks txt2img && "$2" -m diffoundry verify "$1" && ls -A "$1"
"""


@pytest.mark.slow
def test_compile_onto_a_mount_point(tmp_path, checkpoint_of):
    """A container's volume: made there, then made again in the place of the first."""
    target = tmp_path / "volume"
    target.mkdir()
    line = ["unshare", "--mount", "--map-root-user", "sh", "-e", "-c", MOUNT, "sh", target, sys.executable]
    if subprocess.run([*line[:3], "mount", "-t", "tmpfs", "none", target], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    done = subprocess.run([*line, checkpoint_of("pico")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split("files unchanged\n")[1].split()
    assert "bundle.json" in names and not any(name.startswith(".") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


@pytest.mark.slow
def test_compile_into_the_working_directory(tmp_path, checkpoint_of):
    (tmp_path / "b").mkdir()
    line = [sys.executable, "-m", "diffoundry", "compile", checkpoint_of("pico"), "-o", ".", "--tasks", "txt2img"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path / "b")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert "bundle.json" in names and not any(name.startswith(".") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_folder_of_ones_own_in_a_folder_of_others():
    """As in an image, where /bundle belongs to the user and / does not: renaming is not possible, writing is."""
    root, nobody = os.geteuid() == 0, 65534
    with tempfile.TemporaryDirectory() as above:
        target = Path(above, "b")
        target.mkdir()
        Path(above).chmod(0o555)
        if root:  # to whom nothing is forbidden
            os.chown(target, nobody, nobody)
            os.seteuid(nobody)
        try:
            prepare(target)
            (work_folder(target) / "bundle.json").write_text("{}")
            swap(target)
            with pytest.raises(PermissionError):
                prepare(target.with_name("other"))
        finally:
            if root:
                os.seteuid(0)
            Path(above).chmod(0o755)
        assert [path.name for path in target.iterdir()] == ["bundle.json"]
        assert list(Path(above).iterdir()) == [target]


@pytest.fixture
def full_disk():
    """A limit on the size of files stands in for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_picture_is_drawn_where_nothing_can_be_written(copied, full_disk):
    before = sorted(copied.rglob("*"))
    drawn = diffoundry.load(copied, threads=1)("a star", steps=1, width=32, height=32, seed=1).images[0]
    assert drawn.size == (32, 32)
    assert sorted(copied.rglob("*")) == before


def test_a_working_folder_that_cannot_be_marked_is_not_left(tmp_path):
    """Without its mark the next run would take it for another's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            prepare(tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    prepare(tmp_path / "b")
