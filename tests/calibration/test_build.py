"""`build`: lower precisions and plans of a bundle, in a process that has no torch; killed anywhere, nothing is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx_ir
import pytest

import diffoundry
from diffoundry.bundle import Bundle
from diffoundry.bundle.workspace import recover
from diffoundry.calibration import fusion
from diffoundry.common.errors import BundleError
from diffoundry.common.files import sha256_tree
from diffoundry.engines import EngineStore
from diffoundry.engines.fusion.graph import open_model
from diffoundry.engines.fusion.standard import in_standard_operators
from diffoundry.engines.verify import verify
from diffoundry.tests.engines.fusion.kernels import KERNELS

SLIM = "import sys\nfor name in ('torch', 'diffusers', 'transformers', 'onnxscript', 'safetensors'):\n"
SLIM += "    sys.modules[name] = None\nfrom diffoundry.cli import main\nmain()\n"
SCAN = diffoundry.Scan(prompts=("a small red ring",), steps=2)
PLANS = ("--engine", "tensorrt-rtx", "--arch", "sm89")


@pytest.fixture(scope="module")
def built(bundle_of, tmp_path_factory):
    """pico's bundle in fp16 with plans for sm89, built where torch cannot be imported, and what was printed."""
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("built")
    bundle = Path(shutil.copytree(bundle_of("pico"), folder / "pico.bundle"))
    (folder / "prompts.txt").write_text(SCAN.prompts[0])
    scan = ("--scan-prompts", folder / "prompts.txt", "--scan-steps", SCAN.steps)
    line = [sys.executable, "-c", SLIM, "build", bundle, *PLANS, "--precision", "fp16", *scan, "--json"]
    done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return bundle, json.loads(done.stdout)


@pytest.fixture
def copy(built, tmp_path):
    return Path(shutil.copytree(built[0], tmp_path / "home" / "pico.bundle"))


def test_models_and_plans_are_made_without_torch_and_verify_takes_them(built):
    bundle, printed = built
    opened = Bundle.open(bundle)
    assert (opened.manifest.engine, opened.manifest.precision) == ("tensorrt-rtx", "fp16")
    assert all(
        part.precisions == ["fp32", "fp16"] for part in opened.manifest.components.values() if part.role != "step"
    )
    plans = [record for record in EngineStore(bundle / "engines").records() if record["backend"] == "tensorrt-rtx"]
    assert {(record["component"], record["precision"]) for record in plans} == {
        (name, "fp32" if part.role == "step" else "fp16") for name, part in opened.manifest.components.items()
    }
    assert {tuple(record["archs"]) for record in plans} == {("sm89",)}
    assert printed["quality"]["psnr_db"] >= 35 and len(printed["plans"]["plans"]) == len(plans)
    checks = list(verify(opened))
    assert {check.precision for check in checks} == {"fp32", "fp16"} and all(check.passed for check in checks)
    assert [path.name for path in bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_the_same_again_does_nothing(copy, scans):
    before, inode = sha256_tree(copy), copy.stat().st_ino
    said = []
    for scan in (None, SCAN):
        diffoundry.build(
            copy,
            engine="tensorrt-rtx",
            precision="fp16",
            target=diffoundry.Target(archs=("sm89",)),
            scan=scan,
            progress=lambda part, done, total: said.append(part),
        )
    assert not scans and not said
    assert (sha256_tree(copy), copy.stat().st_ino) == (before, inode)
    assert [path.name for path in copy.parent.iterdir()] == ["pico.bundle"]


def test_the_default_can_change_and_no_file_does(copy, scans):
    files = Bundle.open(copy).manifest.all_files()
    made = diffoundry.build(copy, engine="onnxruntime", precision="fp32")
    assert (made.manifest.engine, made.manifest.precision) == ("onnxruntime", "fp32")
    assert made.manifest.all_files() == files
    made.check()
    assert not scans
    assert diffoundry.load(copy).info() == {"engine": "onnxruntime", "precision": "fp32"}


class Killed(BaseException):
    """As a kill: nothing of ours handles it."""


def test_a_build_that_is_killed_at_a_rename_leaves_the_old_or_the_new_bundle(copy, monkeypatch):
    real, at = {name: getattr(Path, name) for name in ("rename", "replace")}, 0
    ends = set()
    while True:
        left = at

        def moved(self, target, name="rename"):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real[name](self, target)

        wanted = "fp32" if Bundle.open(copy).manifest.precision == "fp16" else "fp16"
        before = Bundle.open(copy).manifest
        monkeypatch.setattr(Path, "rename", moved)
        monkeypatch.setattr(Path, "replace", lambda self, target: moved(self, target, "replace"))
        try:
            diffoundry.build(copy, engine="onnxruntime", precision=wanted)
            killed = False
        except Killed:
            killed = True
        for name, function in real.items():
            monkeypatch.setattr(Path, name, function)
        recover(copy)
        after = Bundle.open(copy)
        after.check()
        assert not EngineStore(copy / "engines").problems()
        assert after.manifest.precision in (before.precision, wanted)
        assert after.manifest.all_files() == before.all_files()
        ends.add(after.manifest.precision == wanted)
        if not killed:
            break
        at += 1
    assert at >= 3 and ends == {True, False}
    assert [path.name for path in copy.parent.iterdir()] == ["pico.bundle"]


def test_what_was_converted_before_it_was_stopped_is_not_converted_again(copy, bundle_of, scans):
    """The working folder holds the models and their record, the bundle is still in fp32 alone."""
    bundle = Path(shutil.copytree(bundle_of("pico"), copy.parent / "b"))
    work = copy.parent / ".b.part"
    shutil.copytree(copy, work)
    shutil.copy(bundle / "bundle.json", work)
    from diffoundry.common.files import mark

    mark(work)
    (work / ".stages").mkdir()
    shutil.copy(copy / "reports/stages/precision.fp16.json", work / ".stages")
    (work / "unet" / "stray.onnx").write_text("left by a run that was killed")
    made = diffoundry.build(bundle, precision="fp16", scan=SCAN)
    assert not scans
    assert made.component("unet").variant("fp16") == Bundle.open(copy).component("unet").variant("fp16")
    assert not (bundle / "unet" / "stray.onnx").exists()
    assert json.loads((bundle / "reports/quality.json").read_text()).keys() == {"fp16"}
    made.check()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--engine", "npu"), 1, "unknown engine 'npu'"),
        (("--arch", "sm89", "--engine", "onnxruntime"), 1, "builds no plans"),
        (("--precision", "fp32", "--scan-steps", "4"), 1, "fp32 needs no scan"),
        (("--engine", "tensorrt-rtx", "--arch", "sm42"), 1, "does not know the architecture 'sm42'"),
        (("--shape", "64"), 2, "a shape is WIDTHxHEIGHT, such as 512x768, found '64'"),
        (("--dynamic", "64x64"), 2, "dynamic sizes are MIN-MAX"),
        (("--batch", "many"), 2, "a batch is a number or a range"),
        (("--build-memory", "0"), 2, "takes GiB above 0"),
        (("--arch", ","), 2, "names nothing"),
        (("--scan-size", "64"), 2, "a shape is WIDTHxHEIGHT"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(called, copied, arguments, code, message):
    before = sha256_tree(copied)
    failed = called("build", copied, *arguments)
    assert failed.returncode == code and message in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("Error: ")
    assert sha256_tree(copied) == before and [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_pictures_that_are_too_far_from_fp32_leave_the_bundle_and_nothing_else(copied):
    before = sha256_tree(copied)
    scan = diffoundry.Scan(prompts=SCAN.prompts, steps=1, budget_db=119)
    with pytest.raises(diffoundry.DiffoundryError, match=r"fp16 images differ from fp32 by .*, 119 are asked"):
        diffoundry.build(copied, precision="fp16", scan=scan)
    assert sha256_tree(copied) == before and [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_a_bundle_without_fp32_models_is_refused(copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    for path in manifest["components"]["unet"]["variants"].pop("fp32/onnx")["files"]:
        if not path.endswith("_data"):
            (copied / path).unlink()
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"has no fp32 model of unet to build from"):
        diffoundry.build(copied, precision="fp16")


def test_a_bundle_that_was_changed_or_holds_strangers_is_left_as_it_is(copied):
    (copied / "notes.txt").write_text("mine")
    with pytest.raises(diffoundry.DiffoundryError, match=r"holds notes.txt, .*: move it away"):
        diffoundry.build(copied, precision="fp16")
    (copied / "notes.txt").unlink()
    with (copied / "unet" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(BundleError, match=r"unet/config.json was changed"):
        diffoundry.build(copied, precision="fp16")
    (copied / "bundle.json").unlink()
    with pytest.raises(BundleError, match=r"holds no bundle.json"):
        diffoundry.build(copied, precision="fp16")
    with pytest.raises(BundleError, match=r"is not a folder"):
        diffoundry.build(copied / "nowhere", precision="fp16")
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


@pytest.mark.parametrize("name", ["onnx", "onnx_ir", "ml_dtypes"])
def test_a_missing_module_is_one_line_that_names_the_extra(called, copied, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    failed = called("build", copied, "--precision", "bf16")
    assert failed.returncode == 1
    assert failed.stderr == f"Error: build needs {name}: run `pip install 'diffoundry[build]'`\n"


def test_run_names_build_as_the_remedy(called, copied):
    failed = called("run", copied, "a ring", "--precision", "fp16")
    assert failed.returncode == 1
    assert f"or run `diffoundry build {copied} --precision fp16`" in failed.stderr


@pytest.fixture(scope="module")
def for_cuda(built, tmp_path_factory):
    """That bundle with graphs for CUDA in fp16, made where neither torch nor a GPU is, and what was printed."""
    bundle = Path(shutil.copytree(built[0], tmp_path_factory.mktemp("cuda") / "pico.bundle"))
    line = [sys.executable, "-c", SLIM, "build", str(bundle), "--engine", "onnxruntime:cuda", "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return bundle, json.loads(done.stdout)


def test_graphs_for_cuda_are_made_without_torch_and_held_against_it(for_cuda):
    bundle, printed = for_cuda
    manifest = Bundle.open(bundle).manifest
    assert (manifest.engine, manifest.precision) == ("onnxruntime:cuda", "fp16")
    names = {name for name, part in manifest.components.items() if part.role != "step"}
    assert {name for name, part in manifest.components.items() if "fp16/onnxruntime:cuda" in part.variants} == names
    assert set(printed["fusion"]) == names
    assert all(0 < part["max_abs_error"] < part["allowed"] / 4 for part in printed["fusion"].values())
    Bundle.open(bundle).check()
    assert all(check.passed for check in verify(Bundle.open(bundle)))


def test_graphs_for_cuda_are_made_once_and_go_with_the_models_that_they_were_made_of(for_cuda, tmp_path, monkeypatch):
    bundle = Path(shutil.copytree(for_cuda[0], tmp_path / "pico.bundle"))
    before, written = sha256_tree(bundle), []
    real = fusion.fuse_for_cuda
    monkeypatch.setattr(fusion, "fuse_for_cuda", lambda *given: written.append(given[0].parent.name) or real(*given))
    diffoundry.build(bundle, engine="onnxruntime:cuda", precision="fp16")
    assert sha256_tree(bundle) == before and not written
    other = diffoundry.build(bundle, engine="onnxruntime", precision="fp16", scan=SCAN)  # measured anew
    assert not any("onnxruntime:cuda" in key for part in other.manifest.components.values() for key in part.variants)
    assert not list(bundle.glob("*/*.cuda*"))
    again = diffoundry.build(bundle, engine="onnxruntime:cuda", precision="fp16")
    assert "fp16/onnxruntime:cuda" in again.component("unet").variants and "unet" in written


@pytest.mark.slow
def test_graphs_for_cuda_in_bfloat16_have_kernels_for_all_that_they_compute(copied):
    diffoundry.build(copied, engine="onnxruntime:cuda", precision="bf16", scan=replace(SCAN, budget_db=5.0))
    for path in copied.glob("*/bf16.cuda.onnx"):
        for node in open_model(path).graph:
            made = {value.dtype.name for value in node.outputs if value.name and value.dtype is not None}
            assert "BFLOAT16" not in made or "BFLOAT16" in KERNELS.get(node.op_type, ()), node.op_type
    attention = [
        n for n in open_model(copied / "text_encoder/bf16.cuda.onnx").graph if n.op_type == "MultiHeadAttention"
    ]
    assert len(attention) == 2 and all(node.attributes["unidirectional"].value == 1 for node in attention)


def test_a_damaged_graph_for_cuda_is_in_nobodys_way_and_is_made_again(for_cuda, tmp_path):
    bundle = Path(shutil.copytree(for_cuda[0], tmp_path / "pico.bundle"))
    whole = (bundle / "unet/fp16.cuda.onnx").read_bytes()
    (bundle / "unet/fp16.cuda.onnx").write_bytes(whole[:1000])
    diffoundry.load(bundle, engine="onnxruntime", precision="fp16")("a ring", steps=1)
    diffoundry.build(bundle, engine="onnxruntime:cuda", precision="fp16")
    assert (bundle / "unet/fp16.cuda.onnx").read_bytes() == whole
    Bundle.open(bundle).check()
    (bundle / "unet/fp16.cuda.onnx").unlink()
    made = diffoundry.build(bundle, engine="onnxruntime", precision="fp16")
    assert "fp16/onnxruntime:cuda" not in made.component("unet").variants
    made.check()


def test_a_graph_that_does_not_give_what_torch_gave_is_an_error(copied, monkeypatch):
    before = sha256_tree(copied)
    monkeypatch.setattr(fusion, "in_standard_operators", lambda model: _spoil(model))
    with pytest.raises(
        diffoundry.DiffoundryError, match=r"its graph for CUDA is off by .* from torch, .* is allowed: use --eng"
    ):
        diffoundry.build(copied, engine="onnxruntime:cuda")
    assert sha256_tree(copied) == before


def _spoil(model):
    """Norms of a graph that was fused with another epsilon."""
    fused = any(node.domain for node in model.graph)
    for node in model.graph:
        if fused and "epsilon" in node.attributes:
            node.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 0.3)
    in_standard_operators(model)


def test_plans_are_no_part_of_graphs_for_cuda(called, copied):
    failed = called("build", copied, "--engine", "onnxruntime:cuda", "--shape", "64x64")
    assert failed.returncode == 1 and "the engine onnxruntime:cuda builds no plans" in failed.stderr
