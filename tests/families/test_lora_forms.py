"""Each form of a change against its own definition, written out in torch; and what parts are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffoundry.common.errors import LoraError
from diffoundry.families.lora import Change

LINEAR, CONVOLUTION = (24, 16), (24, 16, 3, 3)
SHAPES = [LINEAR, CONVOLUTION]
RANK, ALPHA, STRENGTH = 4, 2.0, 0.7


def random(*shape):
    return torch.randn(*shape) * 0.3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def added(parts, weight, strength=STRENGTH, **more):
    arrays = {name: np.asarray(value, np.float32) for name, value in parts.items()}
    return Change.of(arrays, tuple(weight.shape), **more).added(weight.numpy(), strength)


def near(found, expected):
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_lora(shape):
    weight, down, up = random(*shape), random(RANK, *shape[1:]), random(shape[0], RANK, *[1] * (len(shape) - 2))
    product = torch.tensordot(up.flatten(1), down, dims=1)
    near(added({"down": down, "up": up, "alpha": np.array(ALPHA)}, weight), STRENGTH * ALPHA / RANK * product)
    near(added({"down": down, "up": up, "alpha": np.array(0.0)}, weight), STRENGTH * product)
    near(added({"down": down, "up": up}, weight), STRENGTH * product)
    near(added({"down": down, "up": up}, weight, scale=lambda rank: ALPHA / rank**0.5), STRENGTH * ALPHA / 2 * product)


def test_lora_of_a_transposed_weight_is_laid_out_as_it_is():
    weight, down, up = random(*LINEAR), random(RANK, 16), random(24, RANK)
    change = Change.of({"down": down.numpy(), "up": up.numpy()}, LINEAR)
    transposed = np.ascontiguousarray(weight.numpy().T).T
    found = change.added(transposed, 1.0)
    assert found.flags.f_contiguous
    near(found, up @ down)


def test_lora_with_a_core():
    weight, down, mid, up = (
        random(*CONVOLUTION),
        random(RANK, 16, 1, 1),
        random(RANK, RANK, 3, 3),
        random(24, RANK, 1, 1),
    )
    near(
        added({"down": down, "mid": mid, "up": up}, weight, 1.0),
        torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0]),
    )
    first, second = Change.of({"down": down.numpy(), "mid": mid.numpy(), "up": up.numpy()}, CONVOLUTION).factors(1.0)
    np.testing.assert_allclose(
        np.tensordot(second, first, 1), added({"down": down, "mid": mid, "up": up}, weight, 1.0), atol=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_loha(shape):
    weight = random(*shape)
    flat = int(np.prod(shape[1:]))
    a1, a2, b1, b2 = random(24, RANK), random(24, RANK), random(RANK, flat), random(RANK, flat)
    parts = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": np.array(ALPHA)}
    near(added(parts, weight), (STRENGTH * ALPHA / RANK * (a1 @ b1) * (a2 @ b2)).reshape(shape))


def test_loha_with_cores():
    weight = random(*CONVOLUTION)
    a, b, t = (
        [random(RANK, 24) for _ in "12"],
        [random(RANK, 16) for _ in "12"],
        [random(RANK, RANK, 3, 3) for _ in "12"],
    )
    parts = {
        f"hada_{kind}{i + 1}{end}": each[i]
        for kind, each, end in (("w", a, "_a"), ("w", b, "_b"), ("t", t, ""))
        for i in (0, 1)
    }
    halves = [torch.einsum("ijkl,ip,jr->prkl", t[i], a[i], b[i]) for i in (0, 1)]
    near(added(parts, weight, 1.0), halves[0] * halves[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_lokr(shape):
    weight, kernel = random(*shape), shape[2:]
    w1, w2 = random(4, 2), random(6, 8, *kernel)
    whole = torch.kron(w1.reshape(4, 2, *[1] * len(kernel)), w2)
    near(added({"lokr_w1": w1, "lokr_w2": w2, "alpha": np.array(ALPHA)}, weight), STRENGTH * whole)
    a, b = random(6, RANK), random(RANK, 8 * int(np.prod(kernel)))
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": np.array(ALPHA)}
    product = (a @ b).reshape(6, 8, *kernel)
    expected = torch.kron(w1.reshape(4, 2, *[1] * len(kernel)), product)
    near(added(parts, weight), STRENGTH * ALPHA / RANK * expected)
    first, second = random(4, RANK), random(RANK, 2)
    both = {"lokr_w1_a": first, "lokr_w1_b": second, "lokr_w2_a": a, "lokr_w2_b": b}
    near(added(both, weight, 1.0), torch.kron((first @ second).reshape(4, 2, *[1] * len(kernel)), product))


def test_lokr_with_a_core():
    weight, w1, t = random(*CONVOLUTION), random(4, 2), random(RANK, RANK, 3, 3)
    a, b = random(RANK, 6), random(RANK, 8)
    parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    near(
        added(parts, weight, 1.0),
        torch.kron(w1[..., None, None], torch.einsum("ijkl,ip,jr->prkl", t, a, b).contiguous()),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_glora(shape):
    weight, tail = random(*shape), [1] * (len(shape) - 2)
    a1, a2 = random(16, RANK, *tail), random(RANK, 16, *tail)
    b1, b2 = random(24, RANK, *tail), random(RANK, *shape[1:])
    behind = torch.einsum("oi...,ij->oj...", weight, a1.flatten(1) @ a2.flatten(1))
    parts = {"a1": a1, "a2": a2, "b1": b1, "b2": b2, "alpha": np.array(ALPHA)}
    near(added(parts, weight), STRENGTH * ALPHA / RANK * (behind + (b1.flatten(1) @ b2.flatten(1)).reshape(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_ia3(shape):
    weight, outputs, inputs = random(*shape), random(24), random(16)
    tail = [1] * (len(shape) - 2)
    near(added({"ia3": outputs, "on_input": 0}, weight), STRENGTH * weight * outputs.reshape(-1, 1, *tail))
    near(added({"ia3": inputs, "on_input": 1}, weight), STRENGTH * weight * inputs.reshape(1, -1, *tail))


def rotations(blocks, constraint=0.0):
    skew = blocks - blocks.transpose(-1, -2)
    norm = skew.norm()
    if 0 < constraint < norm:
        skew = skew * constraint / norm
    one = torch.eye(blocks.shape[-1])
    return (one + skew) @ torch.linalg.inv(one - skew)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_oft(shape, alpha):
    weight, blocks, rescale = random(*shape), random(6, 4, 4), 1 + random(24, *[1] * (len(shape) - 1))
    turn = torch.block_diag(*[each.T for each in rotations(blocks, alpha * 24)])
    turned = torch.tensordot(turn, weight, dims=1)
    near(added({"oft_blocks": blocks, "alpha": np.array(alpha)}, weight), STRENGTH * (turned - weight))
    parts = {"oft_blocks": blocks, "rescale": rescale, "alpha": np.array(alpha)}
    near(added(parts, weight, 1.0), rescale * turned - weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_boft(shape):
    weight, blocks = random(*shape), random(2, 6, 4, 4)
    turned, flat = rotations(blocks), weight.flatten(1)
    for stage in range(2):
        mixed = STRENGTH * turned[stage] + (1 - STRENGTH) * torch.eye(4)
        stride = 2**stage * 2
        order = torch.arange(24).reshape(-1, 2, stride).transpose(1, 2).flatten()
        moved = torch.block_diag(*mixed) @ flat[order]
        flat = torch.empty_like(flat)
        flat[order] = moved
    near(added({"oft_blocks": blocks}, weight), flat.reshape(shape) - weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_magnitude_goes_with_any_form(shape):
    weight, down, up = random(*shape), random(RANK, *shape[1:]), random(24, RANK, *[1] * (len(shape) - 2))
    whole = weight + STRENGTH * torch.tensordot(up.flatten(1), down, dims=1)
    outputs = 1 + torch.rand(24)
    others = tuple(range(1, len(shape)))
    normed = whole / torch.linalg.vector_norm(whole, dim=others, keepdim=True)
    expected = outputs.reshape(-1, *[1] * len(others)) * normed - weight
    near(added({"down": down, "up": up, "dora_scale": outputs}, weight), expected)
    near(added({"down": down, "up": up, "dora_scale": outputs.reshape(-1, *[1] * len(others))}, weight), expected)
    inputs, rest = 1 + torch.rand(1, 16, *[1] * (len(shape) - 2)), (0, *others[1:])
    near(
        added({"down": down, "up": up, "dora_scale": inputs}, weight),
        inputs * whole / torch.linalg.vector_norm(whole, dim=rest, keepdim=True) - weight,
    )


def test_full():
    weight = random(24)
    diff = random(24)
    near(added({"diff": diff}, weight), STRENGTH * diff)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"down": (4, 16)}, "no up"),
        ({"down": (4, 15), "up": (24, 4)}, "another shape"),
        ({"down": (4, 16), "up": (24, 3)}, "another shape"),
        ({"down": (4, 16), "up": (23, 4)}, "another shape"),
        ({"lokr_w1": (4, 2)}, "another shape"),
        ({"hada_w1_a": (24, 4), "hada_w1_b": (4, 16)}, "no hada_w2_a"),
        ({"oft_blocks": (5, 4, 4)}, "another shape"),
        ({"diff": (24, 15)}, "another shape"),
        ({"ia3": (23,), "on_input": ()}, "another shape"),
        ({"down": (4, 16), "up": (24, 4), "diff": (24, 16)}, "no one form"),
        ({"down": (4, 16), "up": (24, 4), "dora_scale": (7,)}, "another shape"),
        ({"a1": (15, 4), "a2": (4, 15), "b1": (24, 4), "b2": (4, 16)}, "another shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, said):
    with pytest.raises(LoraError, match=said):
        Change.of({name: np.zeros(shape, np.float32) for name, shape in parts.items()}, LINEAR)
