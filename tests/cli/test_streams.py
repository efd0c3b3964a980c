"""Standard streams that are closed, full or gone cost no picture, and what cannot be printed is an error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

SMALL = ("--steps", 1, "--width", 32, "--height", 32, "--threads", 1, "--seed", 1)
VERBS = {
    "inspect": ["inspect", "BUNDLE"],
    "verify": ["verify", "BUNDLE"],
    "schedulers": ["schedulers"],
    "table": ["schedulers", "euler", "--steps", "300", "--json"],
    "help": ["run", "--help"],
}


@pytest.fixture
def redirected(tmp_path):
    """`diffoundry ARGS…` with redirections of the shell."""

    def run(redirections, *arguments, env=None):
        line = [sys.executable, "-m", "diffoundry", *map(str, arguments)]
        shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", *line]
        return subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=env)

    return run


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_the_picture_is_made(redirected, redirections, bundle_of, tmp_path):
    done = redirected(redirections, "run", bundle_of("pico"), "a star", *SMALL)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").exists()
    assert done.stdout == ("" if " >&-" in redirections else "out.png (seed 1)\n")


@pytest.mark.parametrize("redirections", ["2>/dev/full", "<&- 2>&-"])
def test_a_warning_does_not_get_into_the_json(redirected, redirections, bundle_of):
    done = redirected(redirections, "run", bundle_of("pico"), "star " * 90, *SMALL, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["truncated"]["prompt"]


@pytest.mark.parametrize("verb", VERBS)
def test_output_that_cannot_be_written_is_one_line(redirected, verb, bundle_of):
    line = [str(bundle_of("pico")) if word == "BUNDLE" else word for word in VERBS[verb]]
    done = redirected(">/dev/full", *line)
    assert done.returncode == 1
    reason = "standard output cannot be written (No space left on device): send it to another file or program"
    assert done.stderr == f"Error: {reason}\n"


def test_the_picture_is_kept_when_its_name_cannot_be_printed(redirected, bundle_of, tmp_path):
    done = redirected(">/dev/full", "run", bundle_of("pico"), "a star", *SMALL, "--json")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert (tmp_path / "out.png").exists()


def test_exit_codes_stay_without_standard_error(redirected, tmp_path):
    assert redirected("2>&-", "run", tmp_path / "no", "a star").returncode == 1
    assert redirected("2>/dev/full", "fly").returncode == 2


def test_a_reader_that_stops_is_no_error(bundle_of):
    line = [sys.executable, "-m", "diffoundry", "inspect", str(bundle_of("pico"))]
    done = subprocess.run(["sh", "-c", '"$@" | head -1', "sh", *line], capture_output=True, text=True, timeout=300)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("verb", ["inspect", "table", "verify"])
def test_no_warning_of_python_reaches_the_user(verb, bundle_of):
    line = [str(bundle_of("pico")) if word == "BUNDLE" else word for word in VERBS[verb]]
    command = [sys.executable, "-W", "error", "-m", "diffoundry", *line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_large_and_odd_pictures_print_no_warning(bundle_of, tmp_path):
    """One of 90 million pixels, and one whose palette says transparency by bytes, of which Pillow warns."""
    Image.new("1", (9_500, 9_500)).save(tmp_path / "large.png")
    Image.new("P", (32, 32)).save(tmp_path / "odd.png", transparency=bytes(range(256)))
    for name, size, said in (("large.png", 33, "Error: width must be a multiple of 8"), ("odd.png", 32, "")):
        asked = [
            "run",
            bundle_of("pico"),
            "a star",
            *SMALL,
            "--strength",
            1,
            "--image",
            name,
            "--json",
            "--width",
            size,
        ]
        line = [sys.executable, "-W", "always", "-m", "diffoundry", *map(str, asked)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == bool(said)
        assert done.stderr.count("\n") == bool(said) and done.stderr.startswith(said)


@pytest.mark.slow
@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&- >&- 2>&-", ">/dev/full"])
def test_a_checkpoint_is_compiled(redirected, redirections, checkpoint_of, tmp_path):
    done = redirected(redirections, "compile", checkpoint_of("pico"), "-o", tmp_path / "b", "--tasks", "txt2img")
    assert done.returncode == (redirections == ">/dev/full"), done.stderr
    assert (tmp_path / "b" / "bundle.json").exists()
