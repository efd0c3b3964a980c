"""Plans built by the real builder, for GPUs that are elsewhere; and builders that fail, crash or are killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from diffoundry.bundle import Variant
from diffoundry.common.errors import EngineError
from diffoundry.engines import EngineStore
from diffoundry.engines.tensorrt import build as build_module
from diffoundry.engines.tensorrt.backend import BACKENDS, Backend
from diffoundry.engines.tensorrt.build import build, clean, find
from diffoundry.engines.tensorrt.layers import Layer, summary
from diffoundry.engines.tensorrt.plan import Profile, Recipe, usable

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
GIB = 2**30


class Gpu:
    def __init__(self, arch="sm89", name="NVIDIA L4"):
        self.arch, self.name = arch, name


def fixed(*shape):
    return (shape, shape, shape)


PROFILE = Profile("64x64", {"latent_sample": fixed(1, 4, 8, 8)})
RANGE = Profile("32x32-128x128", {"latent_sample": ((1, 4, 4, 4), (1, 4, 8, 8), (1, 4, 16, 16))})
RECIPE = Recipe(
    component="vae_decoder",
    source={"vae_decoder/model.onnx": "0" * 64},
    backend="tensorrt-rtx",
    version=str(tensorrt_rtx.__version__),
    archs=("sm89",),
    device="",
    precision="fp32",
    profile=PROFILE,
)


@pytest.fixture
def store(tmp_path):
    return EngineStore(tmp_path / "engines")


@pytest.fixture(scope="module")
def model(bundle_of):
    return bundle_of("pico") / "vae_decoder" / "model.onnx"


@pytest.fixture(scope="module")
def built(model, tmp_path_factory):
    """A store with one plan, and what was told while it was built."""
    made = EngineStore(tmp_path_factory.mktemp("built") / "engines")
    told = []
    build(made, RECIPE, model, progress=lambda phase, part: told.append((phase, part)))
    return made, told


def test_a_plan_is_built_ahead_of_time_with_its_record(built):
    made, told = built
    (record,) = made.records()
    plan = find(made, RECIPE)
    assert plan.path.stat().st_size > 1_000_000
    assert plan.recipe == RECIPE
    assert record["seconds"] > 0 and record["peak_bytes"] > 50e6
    assert record["memory"]["weights"] > 1_000_000
    assert record["made_of"]["layers"]["fp32"] > 20 and set(record["made_of"]["heavy"]) == {"fp32"}
    assert record["made_of"]["not_in_precision"] == []
    layers = json.loads((plan.folder / "layers.json").read_text())
    assert any(layer["nodes"] for layer in layers) and all(layer["name"] for layer in layers)
    parts = [part for _, part in told]
    assert len(parts) >= 2 and 0 <= min(parts) <= max(parts) <= 1 and parts[-1] > parts[0]


def test_what_is_asked_for_in_fp16_and_is_not_is_named(store, model):
    plan = build(store, replace(RECIPE, precision="fp16"), model)
    (record,) = store.records()
    missed = record["made_of"]["not_in_precision"]
    assert len(missed) > 10
    layers = {layer["name"]: layer for layer in json.loads((plan.folder / "layers.json").read_text())}
    nodes = {node for name in missed for node in layers[name]["nodes"]}
    again = summary(
        [Layer(d["name"], d["kind"], d["precision"], tuple(d["nodes"])) for d in layers.values()], "fp16", 1, nodes
    )
    assert len(again["not_in_precision"]) < len(missed)  # those kept on purpose are not told


@pytest.mark.parametrize(
    "change",
    [
        {"source": {"vae_decoder/model.onnx": "1" * 64}},
        {"version": "1.0.0"},
        {"archs": ("sm120",)},
        {"archs": ("sm89", "sm120")},
        {"device": "NVIDIA L4"},
        {"precision": "fp16"},
        {"profile": RANGE},
        {"flags": ("weight-streaming",)},
        {"component": "other"},
        {"backend": "tensorrt"},
    ],
)
def test_all_that_decides_a_plan_is_in_its_key(built, change):
    made, _ = built
    assert find(made, RECIPE) is not None
    assert find(made, replace(RECIPE, **change)) is None


def test_one_plan_serves_several_architectures_at_the_size_of_one(built, store, model):
    both = build(store, replace(RECIPE, archs=("sm89", "sm120")), model)
    made, _ = built
    one = find(made, RECIPE)
    assert both.path.stat().st_size < 1.2 * one.path.stat().st_size


def test_a_range_of_shapes_and_streamed_weights_build(store, model):
    plan = build(store, replace(RECIPE, profile=RANGE, flags=("weight-streaming",)), model)
    assert plan.profile == RANGE and plan.recipe.flags == ("weight-streaming",)


def test_a_damaged_plan_is_built_anew_and_not_loaded(built, tmp_path):
    made, _ = built
    copy = EngineStore(Path(shutil.copytree(made.root, tmp_path / "engines")))
    plan = find(copy, RECIPE)
    plan.check()
    with plan.path.open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xfe")
    with pytest.raises(EngineError, match="was changed after it was built"):
        plan.check()
    assert find(copy, RECIPE) is None
    assert not plan.folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"archs": ["sm120"]},
        {"source": {}},
        {"component": "unet"},
        {"flags": None},
        {"made_of": {}},
        {"files": {"layers.json": ""}},
        {"memory": {"weights": 10**400}},
    ],
)
def test_a_plan_whose_record_was_changed_is_built_anew(built, tmp_path, change):
    made, _ = built
    copy = EngineStore(Path(shutil.copytree(made.root, tmp_path / "engines")))
    (folder,) = copy.root.iterdir()
    value = json.loads((folder / "engine.json").read_text())
    if "files" in change:
        change = {"files": {"layers.json": value["files"]["layers.json"]}}
    (folder / "engine.json").write_text(json.dumps({**value, **change}))
    again = EngineStore(Path(shutil.copytree(copy.root, tmp_path / "again")))
    assert find(copy, RECIPE) is None and not folder.exists()
    clean(again)
    assert list(again.root.iterdir()) == []


def variant(**source):
    return Variant("vae_decoder/model.onnx", source or RECIPE.source)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"component": "unet"}, "holds no tensorrt-rtx plan"),
        ({"backend": "tensorrt"}, "holds no tensorrt plan"),
        ({"variant": variant(x="1")}, "of another model"),
        ({"precision": "fp16"}, "in fp32, fp16 is asked"),
        ({"version": "9.9"}, f"of tensorrt-rtx {tensorrt_rtx.__version__}, installed is 9.9"),
        ({"gpu": Gpu("sm86", "NVIDIA A10")}, r"for sm89, this GPU is NVIDIA A10 \(sm86\)"),
    ],
)
def test_a_plan_of_another_model_version_or_gpu_is_never_served(built, asked, reason):
    made, _ = built
    usual = {
        "component": "vae_decoder",
        "variant": variant(),
        "precision": "fp32",
        "backend": "tensorrt-rtx",
        "version": RECIPE.version,
        "gpu": Gpu(),
    }
    assert len(usable(made, **usual)) == 1
    with pytest.raises(EngineError, match=f"{reason}.*: run `diffoundry build .* --engine"):
        usable(made, **{**usual, **asked})


def test_a_record_under_another_name_is_not_read(built, tmp_path):
    made, _ = built
    copy = EngineStore(Path(shutil.copytree(made.root, tmp_path / "engines")))
    (folder,) = copy.root.iterdir()
    folder.rename(copy.root / ("f" * 32))
    assert copy.records() == []


def test_a_builder_beyond_its_memory_is_stopped_and_leaves_nothing(store, model):
    with pytest.raises(EngineError, match=r"more than the 0\.10 GiB allowed: raise --build-memory"):
        build(store, RECIPE, model, memory_limit=GIB // 10)
    assert list(store.root.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", "the builder was killed .* most likely ran out of it"),
        ("import os; os.kill(os.getpid(), 11)", "the builder crashed with signal SIGSEGV"),
        ("import sys; print('boom', file=sys.stderr); sys.exit(3)", "the builder crashed with exit code 3 .*boom"),
        ("print('no event')", "the builder crashed with exit code 0"),
    ],
)
def test_a_builder_that_dies_is_an_error_message(store, model, monkeypatch, code, message):
    monkeypatch.setattr(build_module, "_WORKER", [sys.executable, "-c", code])
    with pytest.raises(EngineError, match=f"vae_decoder, 64x64: {message}"):
        build(store, RECIPE, model)
    assert list(store.root.iterdir()) == []


def test_a_stopped_compile_leaves_no_builder_behind(store, model):
    pids = []

    def stop(phase, part):
        pids.extend(
            int(path.name)
            for path in Path("/proc").glob("[0-9]*")
            if _parent(path) == os.getpid() and b"tensorrt.worker" in _command(path)
        )
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(store, RECIPE, model, progress=stop)
    assert len(pids) == 1
    assert not Path(f"/proc/{pids[0]}").exists()
    assert list(store.root.iterdir()) == []


def _parent(path):
    try:
        return int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def _command(path):
    try:
        return (path / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_model_that_cannot_be_parsed_and_inputs_that_do_not_fit(store, model, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match=r"the parser refuses model\.onnx"):
        build(store, RECIPE, tmp_path / "model.onnx")
    with pytest.raises(EngineError, match="the model's inputs are latent_sample, the profile has x"):
        build(store, replace(RECIPE, profile=Profile("x", {"x": fixed(1)})), model)
    with pytest.raises(EngineError, match="TensorRT cannot build the plan"):
        build(store, replace(RECIPE, flags=("refit",)), model)
    assert list(store.root.iterdir()) == []


def test_a_builder_does_not_outlive_the_process_that_asked_for_it(model, tmp_path):
    """However that ends: here by a signal that it cannot catch, while the builder is at work."""
    code = (
        "import sys, json; from pathlib import Path; from diffoundry.engines import EngineStore\n"
        "from diffoundry.tests.engines.tensorrt.test_build import RECIPE\n"
        "from diffoundry.engines.tensorrt.build import build\n"
        "build(EngineStore(Path(sys.argv[1])), RECIPE, Path(sys.argv[2]), progress=lambda *_: print('on', flush=True))"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "engines"), str(model)]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        workers = [int(path.name) for path in Path("/proc").glob("[0-9]*") if _parent(path) == process.pid]
        process.kill()
    assert len(workers) == 1
    while Path(f"/proc/{workers[0]}").exists():
        time.sleep(0.02)
    assert list((tmp_path / "engines").rglob("layers.json")) == []  # it did not go on to its end


def test_a_full_disk_is_told_with_its_remedy(store, model):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # less than the plan takes
    try:
        with pytest.raises(EngineError, match=r"vae_decoder, 64x64: .*no space left to write.*free some disk space"):
            build(store, RECIPE, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(store.root.iterdir()) == []


def test_nothing_in_the_working_folder_is_imported_by_the_builder(store, model, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)
    assert build(store, RECIPE, model).path.is_file()


def test_a_module_that_is_missing_broken_or_old_is_told(tmp_path, monkeypatch):
    with pytest.raises(EngineError, match=r"needs no_such_module .*pip install 'diffoundry\[x\]'"):
        Backend("tensorrt", "no_such_module", (1, 0), "x").load()
    (tmp_path / "broken_trt.py").write_text("raise OSError('libnvinfer.so.11: cannot open')")
    (tmp_path / "old_trt.py").write_text("__version__ = '1.4.0.76'")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"broken_trt does not load \(libnvinfer"):
        Backend("tensorrt", "broken_trt", (1, 0), "x").load()
    with pytest.raises(EngineError, match=r"old_trt 1\.4\.0\.76 is too old, 1\.5 is the least"):
        Backend("tensorrt-rtx", "old_trt", (1, 5), "x").load()


def test_the_architectures_are_those_of_the_module():
    known = BACKENDS["tensorrt-rtx"].architectures()
    assert {"sm75", "sm80", "sm86", "sm89", "sm120"} <= set(known)
    assert "sm90" not in known or tensorrt_rtx.__version__ > "1.7"
