"""`onnxruntime:cuda` on a real GPU: where every node runs, what it gives, and that what is captured gives it, too."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from diffoundry.bundle import Bundle
from diffoundry.calibration import Scan
from diffoundry.calibration.build import build
from diffoundry.common.errors import EngineError
from diffoundry.engines.loader import EngineLoader
from diffoundry.engines.onnxruntime import nodes_elsewhere, require_provider
from diffoundry.engines.onnxruntime_cuda import CudaEngine, require_version
from diffoundry.engines.split import SplitEngine
from diffoundry.engines.verify import verify
from diffoundry.runtime.pipeline import load

pytestmark = pytest.mark.gpu
ENGINE = "onnxruntime:cuda"
PROMPT = "a large red star at the left on a navy background"
PRECISIONS = ("fp32", "fp16")
LATENTS = {"fp32": 2e-2, "fp16": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _cuda():
    """The provider, where it starts."""
    try:
        require_provider("cuda")
        require_version()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["pico", "sdxl-small"])
def built(request, bundle_of, tmp_path_factory):
    """A bundle with graphs for CUDA in both precisions."""
    folder = tmp_path_factory.mktemp("built")
    root = shutil.copytree(bundle_of(request.param), folder / "a.bundle")
    for precision in PRECISIONS:
        scan = Scan(steps=2, budget_db=5.0) if precision != "fp32" else None
        build(root, engine=ENGINE, precision=precision, scan=scan)
    return Bundle.open(root)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_node_of_every_component_is_on_the_gpu(built, precision):
    loader = EngineLoader(built, ENGINE, precision)
    for name in built.manifest.components:
        engine = loader.load(name)
        for part in (engine._per_prompt, engine._per_step) if isinstance(engine, SplitEngine) else (engine,):
            assert isinstance(part, CudaEngine)
            assert nodes_elsewhere(part.session, "cuda") == ""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_component_gives_what_torch_gave(built, precision):
    checks = list(verify(built, engine=ENGINE, precision=precision))
    assert checks and all(check.passed for check in checks), checks


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pictures_are_those_of_the_cpu_before_and_after_they_are_captured(built, bundle_of, precision, recwarn):
    options = {"steps": 6, "seed": 7, "scheduler": "euler"}
    pipe = load(built.root, engine=ENGINE, precision=precision)
    wanted = load(built.root, engine="onnxruntime", precision="fp32")(PROMPT, **options)
    for _ in range(4):
        found = pipe(PROMPT, **options)
        np.testing.assert_allclose(found.latents, wanted.latents, atol=LATENTS[precision])
    assert any(each.startswith("6 steps of") for each in pipe.info()["captured"])
    assert not [str(each.message) for each in recwarn if "captured" in str(each.message)]


def test_sizes_in_turn_and_memory(built):
    pipe = load(built.root, engine=ENGINE, precision="fp16")
    device = pipe.engine("step").gpu.device
    sizes = [(64, 64), (96, 64), (64, 96), (96, 96)]
    first = {size: pipe(PROMPT, steps=3, seed=1, width=size[0], height=size[1]).latents for size in sizes}
    for _ in range(3):
        for size in sizes:
            pipe(PROMPT, steps=3, seed=1, width=size[0], height=size[1])
    free = device.call("cudaMemGetInfo")[0]
    for _ in range(10):
        for size in sizes:
            found = pipe(PROMPT, steps=3, seed=1, width=size[0], height=size[1]).latents
            np.testing.assert_allclose(found, first[size], atol=5e-2)
    assert device.call("cudaMemGetInfo")[0] == free


def test_nothing_of_the_provider_reaches_the_terminal(built, capfd):
    load(built.root, engine=ENGINE, precision="fp16")(PROMPT, steps=2, seed=1)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
