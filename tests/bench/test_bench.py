"""`diffoundry bench` on pico: what is measured, what is written, and what is refused before anything is measured."""

from __future__ import annotations

import functools
import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console

from diffoundry.bench import table
from diffoundry.bench.report import from_json, load
from diffoundry.bench.timing import median, percentile
from diffoundry.tests.bench.reports import report

QUICK = ("--turns", "2", "--cold", "1", "--steps", "4")


def test_a_run_measures_starts_turns_stages_components_and_batches(command, bundle_of, tmp_path):
    path = tmp_path / "report.json"
    done = command("bench", bundle_of("pico"), *QUICK, "--scenario", "offline", "--batch", "2", "--json", path)
    assert done.returncode == 0, done.stderr
    found = load(path)
    assert found.complete and found.command.startswith("diffoundry bench ") and found.reference == "diffoundry, fp32"
    assert found.bundle.name == "pico" and found.request.rows == 2 and found.request.steps == 4
    (ours,) = found.systems
    assert (ours.name, ours.title, ours.error) == ("diffoundry", "diffoundry, onnxruntime", None)
    assert ours.peak_rss_bytes > 10 << 20 and "onnxruntime" in ours.versions
    (start,) = ours.cold
    assert 0 < start.import_s < start.load_s < start.first_step_s < start.first_image_s
    assert len(ours.turns) == 2
    for turn in ours.turns:
        stages = turn.stages
        assert len(stages.steps) == 3 and len(stages.denoiser) == len(stages.loop) == 4
        whole = stages.before + stages.first_step + sum(stages.steps) + stages.after
        assert whole == pytest.approx(turn.seconds, abs=1e-3)
        assert stages.tokenize + stages.text < stages.before and 0 < stages.decode < stages.after
        assert sum(stages.denoiser) + sum(stages.loop) == pytest.approx(stages.first_step + sum(stages.steps))
    calls = {each.name: each.calls_per_picture for each in found.components}
    assert calls == {"text_encoder": 1, "unet": 4, "vae_decoder": 1}
    product = found.machine.peaks.matmul_flops_per_s["fp32"]
    for each in found.components:
        assert each.share_of_matmul_peak == pytest.approx(each.flops / each.seconds_per_call / product)
    (batches,) = found.scenario.offline
    assert [tried.batch for tried in batches.tried] == [1, 2] and batches.system == "diffoundry"
    assert batches.images_per_s == max(tried.images_per_s for tried in batches.tried)
    assert "Where our time goes" in done.stdout and "diffoundry, onnxruntime" in done.stdout


def test_json_on_standard_output_is_all_that_is_there(command, bundle_of):
    prompt = ("--prompt", "a small white ring", "--seed", "0", "--guidance", "1", "--threads", "1", "--width", "72")
    done = command("bench", bundle_of("pico"), "--turns", "1", "--cold", "0", "--steps", "2", *prompt, "--json", "-")
    assert done.returncode == 0 and done.stderr == ""
    found = from_json(json.loads(done.stdout), "standard output")
    asked = found.request
    assert (asked.prompt, asked.seed, asked.guidance, asked.threads) == ("a small white ring", 0, 1.0, 1)
    assert (asked.width, asked.height, asked.rows, asked.cold) == (72, 64, 1, 0)
    assert found.systems[0].cold == () and len(found.systems[0].turns) == 1


def test_an_interrupted_run_keeps_what_it_has(bundle_of, tmp_path):
    path = tmp_path / "report.json"
    line = [sys.executable, "-m", "diffoundry", "bench", str(bundle_of("pico")), "--turns", "1000", "--cold", "1"]
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    process = subprocess.Popen([*line, "--json", str(path)], stdout=-1, stderr=-1, text=True, preexec_fn=listen)
    for shown in process.stderr:
        if "turn" in shown:
            break
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=60)
    assert (
        process.returncode == 1 and f"interrupted: the report has what was measured until then; it is in {path}" in said
    )
    found = load(path)
    assert not found.complete and len(found.systems[0].cold) == 1 and len(found.systems[0].turns) < 1000
    assert "did not go to its end" in shown


USAGE = {
    "no bundle": ([], "name the bundle"),
    "a batch without a scenario": (["x", "--batch", "2"], "--batch goes with --scenario offline or server"),
    "a limit without a server": (["x", "--scenario", "offline", "--p99", "1"], "--p99 goes with --scenario server"),
    "a limit of nothing": (["x", "--scenario", "server", "--p99", "0"], "--p99"),
    "an unknown scenario": (["x", "--scenario", "fast"], "--scenario"),
    "no turns": (["x", "--turns", "0"], "--turns"),
    "an unknown peer": (["x", "--vs", "diffusers,nobody"], "unknown system 'nobody': choose one of"),
    "no peer": (["x", "--vs", ","], "names nothing"),
    "a peer without its checkpoint": (["x", "--vs", "diffusers"], "give --checkpoint FOLDER"),
    "no checkpoint there": (["x", "--vs", "compile", "--checkpoint", "/no/such"], "/no/such has no model_index.json"),
    "a checkpoint without a peer": (["x", "--checkpoint", "y"], "--checkpoint goes with --vs"),
    "an environment for nobody": (["--setup", "nobody"], "unknown system 'nobody': choose one of"),
    "an environment and a bundle": (["x", "--setup", "diffusers"], "--setup is given alone: leave out BUNDLE"),
    "a comparison with an option": (["--compare", "a", "b", "--steps", "2"], "leave out --steps"),
    "a limit that is no number": (["x", "--scenario", "server", "--p99", "nan"], "nan is not in the range 0<x<=86400"),
    "a page on standard output": (["x", "--html", "-"], "--html needs the name of a file"),
    "no name": (["x", "--json", ""], "--json needs the name of a file"),
    "one file for two things": (["x", "--json", "r.svg", "--plot", "r.svg"], "name one file"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_told(case, called):
    options, expected = USAGE[case]
    done = called("bench", *options)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


REFUSED = {
    "no such bundle": (["nowhere"], "nowhere is not a folder"),
    "a folder that is not there": (["x", "--json", "nowhere/r.json"], "the folder nowhere does not exist"),
    "a file that is a folder": (["x", "--html", "."], "give --html another name"),
    "a name that is too long": (["x", "--json", "r" * 250], "of --json is too long"),
    "a device": (["x", "--json", "/dev/null"], "/dev/null is a device or a pipe: give --json another name"),
    "a folder without room for files": (["x", "--html", "/proc/r.html"], "no file can be made in /proc"),
    "a plot of another kind": (["x", "--plot", "r.gif"], "ends in .png or .svg"),
    "reports that are not there": (["--compare", "old.json", "new.json"], "the report is missing: old.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_one_line_before_anything_is_measured(case, called):
    options, expected = REFUSED[case]
    done = called("bench", *options)
    assert done.returncode == 1 and done.stdout == "" and expected in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_a_report_does_not_take_the_place_of_a_file_of_the_bundle(called, bundle_of):
    manifest = bundle_of("pico") / "bundle.json"
    before = manifest.read_bytes()
    done = called("bench", bundle_of("pico"), "--json", manifest)
    assert done.returncode == 1 and "is a file of the bundle" in done.stderr and done.stderr.count("\n") == 1
    assert manifest.read_bytes() == before


def test_a_plot_without_matplotlib_says_how_to_get_it_before_anything_is_measured(called, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    done = called("bench", "nowhere", "--plot", "r.png")
    assert done.returncode == 1 and "pip install 'diffoundry[plot]'" in done.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--width", "63"], "multiple of 8"),
        (["--scheduler", "eulre"], "euler"),
        (["--precision", "fp16"], "diffoundry build"),
        (["--engine", "nothing"], "unknown engine"),
        (["--seed", str(2**70)], "seed"),
    ],
)
def test_a_request_that_the_bundle_cannot_do_is_not_measured(options, expected, called, bundle_of):
    done = called("bench", bundle_of("pico"), *options)
    assert done.returncode == 1 and expected in done.stderr.splitlines()[-1] and done.stdout == ""


def test_a_link_is_followed_and_a_checkpoint_of_another_model_refused(called, bundle_of, checkpoint_of, tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "r.json")
    few = ["--turns", "1", "--cold", "0", "--steps", "1"]
    assert called("bench", bundle_of("pico"), *few, "--json", link).returncode == 0
    assert link.is_symlink() and load(tmp_path / "r.json").complete
    other = checkpoint_of("sd15-small")
    done = called("bench", bundle_of("pico"), *few, "--vs", "diffusers", "--checkpoint", other)
    assert done.returncode == 1 and f"{other} is not what" in done.stderr and done.stdout == ""


def test_a_bundle_that_draws_from_no_prompt_is_refused(called, copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    (copied / "bundle.json").write_text(json.dumps(manifest | {"tasks": ["inpaint"]}))
    done = called("bench", copied)
    assert done.returncode == 1 and "its tasks are inpaint" in done.stderr


@pytest.mark.slow
def test_what_was_measured_is_shown_where_the_disk_is_full(bundle_of, tmp_path):
    line = [sys.executable, "-m", "diffoundry", "bench", str(bundle_of("pico")), "--turns", "30", "--cold", "0"]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, 14_000))

    done = subprocess.run([*line, "--json", "r.json"], capture_output=True, text=True, preexec_fn=limit, cwd=tmp_path)
    assert done.returncode == 1 and "Error: no space left to write" in done.stderr
    assert "denoiser" in done.stdout or "unet" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_damaged_bundle_is_not_timed(called, copied, tmp_path):
    model = copied / "unet" / "model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    done = called("bench", copied, "--json", tmp_path / "r.json")
    assert done.returncode == 1 and "unet/model.onnx was changed after the bundle was built" in done.stderr
    assert done.stdout == "" and not (tmp_path / "r.json").exists()


def test_a_bundle_that_gives_something_else_is_not_timed(called, copied):
    """Its hashes are right and its outputs are not those of torch."""
    import hashlib

    import numpy as np

    path = copied / "reports" / "reference" / "vae_decoder.npz"
    with np.load(path) as held:
        arrays = {name: held[name] + (name.startswith("out.") and np.float32(0.5)) for name in held.files}
    np.savez(path, **arrays)
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["files"]["reports/reference/vae_decoder.npz"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copied / "bundle.json").write_text(json.dumps(manifest))
    done = called("bench", copied)
    assert done.returncode == 1 and "vae_decoder no longer gives what torch gave, so it is not timed" in done.stderr


@pytest.mark.parametrize("width", [200, 80, 30])
def test_every_figure_is_shown_in_any_width(width):
    made = report()
    made = replace(made, systems=tuple(replace(each, error="it ran out of memory") for each in made.systems))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    table.show(made, console)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width
    words = " ".join(shown.split())
    for system in made.systems:
        seconds = [turn.seconds for turn in system.turns]
        for value in (median(seconds), percentile(seconds, 99)) if seconds else ():
            assert f"{1e3 * value:.3g} ms" in words
    assert "it ran out of memory" in words


@pytest.mark.slow
def test_a_server_finds_the_rate_that_its_limit_allows(command, bundle_of, tmp_path):
    path = tmp_path / "report.json"
    done = command(
        "bench", bundle_of("pico"), *QUICK, "--scenario", "server", "--p99", "1.5", "--batch", "4", "--json", path
    )
    assert done.returncode == 0, done.stderr
    (found,) = load(path).scenario.server
    assert found.p99_limit_s == 1.5 and found.rate_per_s > 0 and len(found.latencies_s) >= 20
    assert percentile(found.latencies_s, 99) <= 1.5
    for tried in found.tried:
        assert (tried.p99 <= 1.5) == (tried.rate <= found.rate_per_s)


@pytest.mark.slow
def test_a_limit_that_no_rate_keeps_is_told(command, bundle_of, tmp_path):
    path = tmp_path / "report.json"
    options = ("--scenario", "server", "--p99", "0.001", "--json", path)
    assert command("bench", bundle_of("pico"), *QUICK, *options).returncode == 0
    (found,) = load(path).scenario.server
    assert found.rate_per_s == 0 and found.latencies_s == ()


@pytest.mark.slow
def test_a_lower_precision_is_held_against_fp32(command, copied, tmp_path):
    """The picture of another precision is compared with ours in fp32, and a change is marked."""
    path = tmp_path / "report.json"
    assert command("build", copied, "--precision", "fp16").returncode == 0
    done = command("bench", copied, *QUICK, "--precision", "fp16", "--json", path)
    assert done.returncode == 0, done.stderr
    found = load(path)
    (ours,) = found.systems
    assert found.reference == "diffoundry, onnxruntime, fp32" and ours.precision == "fp16"
    assert ours.max_levels is not None and ours.changes_picture == (ours.max_levels > 1)
    assert ours.psnr_db is None or ours.psnr_db > 30
    assert set(found.machine.peaks.matmul_flops_per_s) == {"fp32", "fp16"}
