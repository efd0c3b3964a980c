"""A bundle run from its plans, from the store to the picture.

The GPU is played in host memory (`tests/engines/tensorrt/simulated.py` says what that proves).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from diffoundry.bundle import Bundle
from diffoundry.common.errors import BundleError, EngineError
from diffoundry.engines import EngineStore
from diffoundry.engines.tensorrt.bundle_plans import resolve_machine
from diffoundry.engines.tensorrt.plan import PLAN_NAME, Recipe
from diffoundry.engines.tensorrt.target import Target, profiles
from diffoundry.engines.verify import verify
from diffoundry.runtime.loop.guidance import Guidance
from diffoundry.runtime.pipeline import Request, load
from diffoundry.tests.engines.tensorrt.simulated import VERSION

PROMPT = "a large red star at the left on a navy background"
ENGINE = "tensorrt-rtx"
TOLERANCE = 5e-3
MEASURED = {
    "seconds": 1.0,
    "peak_bytes": 1,
    "memory": {"weights": 1},
    "warnings": [],
    "made_of": {"layers": {}, "heavy": {}, "attention": {"fused": 0, "of": 0}, "not_in_precision": []},
}


@pytest.fixture(autouse=True)
def _simulated(trt):
    """Plans run on the simulated GPU."""


def add_plans(root: Path, target: Target, *, archs=("sm89",), version=VERSION, device=""):
    """What the builder leaves in the store, with plans that the simulation loads."""
    bundle, store = Bundle.open(root), EngineStore(root / "engines")
    for name, component in bundle.manifest.components.items():
        source = component.variant("fp32").files
        for profile in profiles(bundle.manifest, name, target):
            recipe = Recipe(name, source, ENGINE, version, archs, device, "fp32", profile, target.flags)
            built_from = recipe.built_from()
            told = {
                "onnx": str(bundle.path(component.variant("fp32").model)),
                "profile": asdict(profile),
                "arch": "sm89",
            }
            with store.building(store.key(built_from), {**built_from, **MEASURED}) as work:
                (work / PLAN_NAME).write_text(json.dumps({**told, "flags": list(target.flags), "dtypes": {}}))


@pytest.fixture
def planned(copied):
    add_plans(copied, Target(sizes=((64, 64), (96, 64)), batch=(1, 1)))
    return copied


@pytest.fixture(scope="module")
def host(bundle_of):
    return load(bundle_of("pico"))


def drawn(pipe, **options):
    return pipe(**{"prompt": PROMPT, "seed": 7, "steps": 6, **options})


def test_the_picture_is_that_of_onnx_runtime(planned, host):
    pipe = load(planned, engine=ENGINE)
    found, wanted = drawn(pipe), drawn(host)
    np.testing.assert_allclose(found.latents, wanted.latents, atol=TOLERANCE)
    assert np.abs(np.asarray(found.images[0], int) - np.asarray(wanted.images[0], int)).max() <= 1
    told = pipe.info()
    assert (told["engine"], told["precision"]) == (ENGINE, "fp32")
    assert {name: plan["profile"] for name, plan in told["plans"].items()} == {
        "text_encoder": "77 tokens, 1-8 prompts",
        "unet": "64x64, batch 1",
        "step": "any of the sizes, 1-2 rows",
        "vae_decoder": "64x64",
    }


def test_the_plan_of_the_size_serves_and_what_it_was_is_told_after_its_memory_is_free(planned, host):
    pipe = load(planned, engine=ENGINE)
    wide = {"width": 96, "height": 64}
    result = pipe.generate(Request(PROMPT, seed=7, steps=6, **wide), low_memory=True)
    np.testing.assert_allclose(result.latents, drawn(host, **wide).latents, atol=TOLERANCE)
    assert pipe.info()["plans"]["unet"]["profile"] == "96x64, batch 1"
    assert pipe.info()["plans"]["vae_decoder"]["profile"] == "96x64"


def test_images_and_masks_go_through_plans_too(planned, host):
    pipe = load(planned, engine=ENGINE)
    image = drawn(host).images[0]
    options = {"prompt": "a green star", "image": image, "strength": 0.5}
    np.testing.assert_allclose(drawn(pipe, **options).latents, drawn(host, **options).latents, atol=TOLERANCE)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48] = 255
    inpainted = {**options, "mask": mask}
    np.testing.assert_allclose(drawn(pipe, **inpainted).latents, drawn(host, **inpainted).latents, atol=TOLERANCE)


def test_more_prompts_than_a_plan_takes_go_in_parts(planned, host):
    pipe = load(planned, engine=ENGINE)
    prompts = [
        f"a {size} {colour} ring"
        for colour in ("red", "green", "blue", "white", "yellow", "pink")
        for size in ("small", "large")
    ]
    found, wanted = pipe.encode(prompts)[0], host.encode(prompts)[0]
    assert len(found) == 12
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_size_outside_every_plan_is_told_before_the_loop(planned):
    with pytest.raises(
        EngineError, match=r"unet: no plan takes .*; built are: 64x64, batch 1; 96x64, batch 1\. Compile"
    ):
        drawn(load(planned, engine=ENGINE), width=128, height=64)


@pytest.mark.parametrize(("guidance", "rows"), [(7.5, [2, 2, 2]), (1.0, [2, 2])])
def test_a_batch_beyond_the_plans_is_run_in_smaller_ones(planned, host, trt, guidance, rows):
    pipe = load(planned, engine=ENGINE)
    request = Request(PROMPT, seed=7, steps=1, count=3, guidance=Guidance(guidance))
    for batch in (None, 3):
        trt.runs.clear()
        found = pipe.generate(request, batch=batch).latents
        np.testing.assert_allclose(found, host.generate(request).latents, atol=TOLERANCE)
        assert [shapes["sample"][0] for name, shapes in trt.runs if name == "unet"] == rows


def test_a_plan_that_was_changed_is_never_run(planned):
    store = EngineStore(planned / "engines")
    for record in store.records():
        if record["component"] == "unet" and record["backend"] == ENGINE:
            path = store.root / record["key"] / PLAN_NAME
            path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(
        EngineError, match=r"unet: the plan .* was changed after it was built: compile the bundle again"
    ):
        drawn(load(planned, engine=ENGINE))


def test_a_model_that_was_changed_is_never_run_by_its_old_plan(planned):
    path = planned / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"unet/model\.onnx was changed"):
        drawn(load(planned, engine=ENGINE))


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ({"version": "1.5.0"}, r"text_encoder: its plans are of tensorrt-rtx 1\.5\.0, installed is 1\.7\.0"),
        ({"archs": ("sm120",)}, r"its plans are for sm120, this GPU is Simulated GPU \(sm89\)"),
        ({"device": "Another GPU"}, "its plans are for Another GPU, this GPU is Simulated GPU"),
    ],
)
def test_plans_of_another_version_or_gpu_are_refused(copied, built, message):
    add_plans(copied, Target(), **built)
    with pytest.raises(EngineError, match=message):
        drawn(load(copied, engine=ENGINE))


def test_a_gpu_that_tensorrt_for_rtx_does_not_run_on_is_named_before_anything_is_loaded(planned, simulated_cuda):
    simulated_cuda.capability = (9, 0)
    with pytest.raises(EngineError, match=r"does not run on Simulated GPU \(sm90\), only on .*: use --engine onnxr"):
        load(planned, engine=ENGINE)


def test_no_plan_of_tensorrt_for_rtx_is_built_for_a_gpu_that_does_not_run_it(simulated_cuda):
    simulated_cuda.capability = (9, 0)
    with pytest.raises(EngineError, match=r"does not run on Simulated GPU \(sm90\), only on .*: use --engine onnxr"):
        resolve_machine(ENGINE, "fp16", Target())


def test_a_bundle_without_plans_says_how_to_get_them(copied):
    with pytest.raises(EngineError, match="text_encoder: the bundle holds no tensorrt-rtx plan: run `diffoundry build"):
        drawn(load(copied, engine=ENGINE))
    for name in ("step", "reports"):
        shutil.rmtree(copied / name)
    for path in (copied / "bundle.json", *copied.glob("*/fused.onnx"), *copied.glob("*/per_prompt.onnx")):
        path.unlink()
    with pytest.raises(EngineError, match="holds no plans: make a bundle"):
        load(copied, engine=ENGINE)


def test_verify_holds_plans_against_onnx_runtime_at_their_own_shapes(planned, trt):
    checks = list(verify(Bundle.open(planned), engine=ENGINE))
    assert {check.precision for check in checks} == {"fp32"}
    assert all(check.passed for check in checks)
    names = [check.component for check in checks]
    assert names.count("unet") == 2 and names.count("step") == 1
    assert ("unet", {"sample": (2, 4, 8, 12), "timestep": (2,), "encoder_hidden_states": (2, 77, 64)}) in trt.runs


@pytest.mark.parametrize(
    "change",
    [
        {"profile": {"name": "x"}},
        {"archs": ["sm120"]},
        {"archs": 5},
        {"version": 5, "flags": ["version-compatible"]},
        {"precision": "fp16"},
        {"flags": None},
        {"source": {}},
        {"files": {"layers.json": "0" * 64}},
        {"made_of": 5},
        {"seconds": 10**400},
    ],
)
def test_what_a_changed_record_says_is_not_believed(planned, change):
    for record in EngineStore(planned / "engines").records():
        if record["component"] == "unet" and record["backend"] == ENGINE:
            path = planned / "engines" / record["key"] / "engine.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(EngineError, match=r"unet: the (record|profile) of (a|the) plan .*: compile the bundle again"):
        drawn(load(planned, engine=ENGINE))


def test_one_changed_record_does_not_keep_the_other_plans_from_running(planned, host):
    records = [r for r in EngineStore(planned / "engines").records() if r["backend"] == ENGINE]
    wide = next(r for r in records if r["profile"]["name"] == "96x64, batch 1")
    path = planned / "engines" / wide["key"] / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "archs": ["sm120"]}))
    np.testing.assert_allclose(drawn(load(planned, engine=ENGINE)).latents, drawn(host).latents, atol=TOLERANCE)


def test_a_forked_process_is_told_to_open_the_gpu_itself(planned):
    pipe = load(planned, engine=ENGINE)
    child = os.fork()
    if child == 0:
        try:
            pipe(PROMPT, steps=1)
        except EngineError as error:
            os._exit(7 if "load the bundle in this one" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
