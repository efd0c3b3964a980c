"""Graphs that are written otherwise for OpenVINO: the same numbers, in all that they apply to and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
openvino = pytest.importorskip("openvino")

from diffoundry.bundle import Bundle  # noqa: E402
from diffoundry.engines.loader import EngineLoader  # noqa: E402
from diffoundry.engines.openvino import load  # noqa: E402
from diffoundry.engines.openvino.norms import without_reshapes  # noqa: E402
from diffoundry.engines.openvino.upsample import in_one_convolution, merged  # noqa: E402


def read(module, shape, tmp_path, dynamic=True):
    """The model of a torch module with one input `x`, as OpenVINO reads its ONNX."""
    axes = {i: torch.export.Dim.DYNAMIC for i in range(len(shape)) if i != 1} if dynamic else None
    torch.onnx.export(
        module.eval(),
        (torch.zeros(shape),),
        tmp_path / "m.onnx",
        input_names=["x"],
        dynamic_shapes=(axes,) if dynamic else None,
        opset_version=20,
        external_data=False,
        verbose=False,
    )
    return openvino.Core().read_model(tmp_path / "m.onnx")


def run(model, x):
    return openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x])[0]


def kinds(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


class Norm(torch.nn.Module):
    """A group norm, with what may stand around it."""

    def __init__(self, groups, channels, affine=True):
        super().__init__()
        self.norm = torch.nn.GroupNorm(groups, channels, eps=1e-5, affine=affine)
        if affine:
            torch.manual_seed(0)
            self.norm.weight.data.normal_()
            self.norm.bias.data.normal_()

    def forward(self, x):
        return torch.nn.functional.silu(self.norm(x))


@pytest.mark.parametrize(
    ("groups", "channels", "size"),
    [(4, 12, (9, 7)), (32, 32, (4, 4)), (1, 5, (8, 8)), (2, 8, (3, 4, 5)), (2, 8, (33,))],
)
def test_a_group_norm_is_that_of_torch(groups, channels, size, tmp_path):
    module, shape = Norm(groups, channels), (3, channels, *size)
    model = without_reshapes(read(module, (2, channels, *(n + 1 for n in size)), tmp_path))
    assert "MVN" not in kinds(model)
    # a mean far from zero: a difference of squares would lose four of the seven digits here
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + 100 * np.arange(3).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    x = x.astype(np.float32)
    wanted = module(torch.from_numpy(x)).detach().numpy()
    assert np.abs(run(model, x) - wanted).max() < 2e-4


def test_other_norms_are_left_alone(tmp_path):
    for module, shape in ((torch.nn.LayerNorm(8), (2, 5, 8)), (torch.nn.InstanceNorm2d(8, affine=True), (2, 8, 4, 4))):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        model = without_reshapes(read(module, shape, tmp_path, dynamic=False))
        assert "MVN" in kinds(model)
        assert np.abs(run(model, x) - module(torch.from_numpy(x)).detach().numpy()).max() < 1e-5


class Upsampled(torch.nn.Module):
    """diffusers' upsampling: by a factor, or to the size of another tensor."""

    def __init__(self, factor=2, mode="nearest", twice=False, size=None, **options):
        super().__init__()
        torch.manual_seed(0)
        options = {"kernel_size": 3, "padding": 1, **options}
        self.convolution = torch.nn.Conv2d(6, 10, **options)
        self.factor, self.mode, self.twice, self.size = factor, mode, twice, size

    def forward(self, x):
        options = {"size": self.size} if self.size else {"scale_factor": self.factor}
        large = torch.nn.functional.interpolate(x, mode=self.mode, **options)
        made = self.convolution(large)
        return made + large.mean() if self.twice else made


@pytest.mark.parametrize("size", [(1, 6, 1, 1), (2, 6, 5, 3), (1, 6, 16, 16)])
def test_upsampling_and_a_convolution_are_one(size, tmp_path):
    module = Upsampled()
    model = in_one_convolution(read(module, (2, 6, 7, 9), tmp_path))
    assert "Interpolate" not in kinds(model) and "ConvolutionBackpropData" in kinds(model)
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    wanted = module(torch.from_numpy(x)).detach().numpy()
    assert np.abs(run(model, x) - wanted).max() < 1e-5


def test_a_size_that_is_twice_the_other_is_known_when_the_inputs_are(tmp_path):
    for size, changed in (((10, 6), True), ((9, 6), False)):
        module = Upsampled(size=size)
        model = in_one_convolution(read(module, (1, 6, 5, 3), tmp_path, dynamic=False))
        assert ("Interpolate" not in kinds(model)) == changed
        x = np.random.default_rng(0).standard_normal((1, 6, 5, 3)).astype(np.float32)
        assert np.abs(run(model, x) - module(torch.from_numpy(x)).detach().numpy()).max() < 1e-5


OTHERS = {
    "by three": {"factor": 3},
    "by two and three": {"factor": (2.0, 3.0)},
    "bilinear": {"mode": "bilinear"},
    "read by others too": {"twice": True},
    "a kernel of one": {"kernel_size": 1, "padding": 0},
    "a kernel of five": {"kernel_size": 5, "padding": 2},
    "no border": {"padding": 0},
    "a stride": {"stride": 2},
    "a dilation": {"dilation": 2, "padding": 1},
    "groups": {"groups": 2},
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_that_is_left_alone(case, tmp_path):
    module = Upsampled(**OTHERS[case])
    model = in_one_convolution(read(module, (2, 6, 7, 9), tmp_path))
    assert "Interpolate" in kinds(model)
    x = np.random.default_rng(0).standard_normal((1, 6, 8, 6)).astype(np.float32)
    assert np.abs(run(model, x) - module(torch.from_numpy(x)).detach().numpy()).max() < 1e-5


def test_the_merged_kernel_has_the_same_sum():
    weights = np.random.default_rng(0).standard_normal((3, 2, 3, 3)).astype(np.float32)
    found = merged(weights)
    assert found.shape == (2, 3, 4, 4) and found.dtype == np.float32
    # each of the four phases of the output sees all nine weights
    assert np.allclose(found.sum((2, 3)), 4 * weights.sum((2, 3)).T, atol=1e-5)


@pytest.mark.parametrize("name", ["vae_decoder", "vae_encoder", "unet"])
def test_all_that_a_model_has_are_found(name, bundle_of):
    bundle, core = Bundle.open(bundle_of("sd15-small")), openvino.Core()
    component = bundle.component(name)
    model = core.read_model(str(bundle.path(component.variants["fp32/onnxruntime:cpu"].model)))
    sizes = {1: lambda shape: [2], 3: lambda shape: [2, 77, shape[2]], 4: lambda shape: [2, shape[1], 16, 16]}
    model.reshape({t.get_any_name(): sizes[len(t.partial_shape)](t.partial_shape) for t in model.inputs})
    before = kinds(model)
    for rewrite in load._rewrites(component.role, "fp32"):
        model = rewrite(model)
    after = kinds(model)
    if name != "vae_encoder":
        assert before.count("Interpolate") == after.count("ConvolutionBackpropData") > 0
    if name != "unet":
        assert before.count("MVN") > 10 and after.count("MVN") <= 1  # that of attention, of another form


@pytest.mark.parametrize("role", ["vae_decoder", "vae_encoder"])
def test_the_autoencoder_gives_what_onnx_runtime_gives(role, bundle_of):
    bundle = Bundle.open(bundle_of("sd15-small"))
    rng = np.random.default_rng(0)
    for size in ((1, 16, 16), (2, 16, 24)):
        given = {
            tensor.name: rng.standard_normal((size[0], tensor.shape[1], *size[1:])).astype(np.float32)
            for tensor in bundle.component(role).inputs
        }
        wanted, found = (EngineLoader(bundle, name).load(role)(given) for name in ("onnxruntime", "openvino"))
        for key, array in wanted.items():
            assert np.abs(found[key] - array).max() < 2e-5 * np.abs(array).max()
