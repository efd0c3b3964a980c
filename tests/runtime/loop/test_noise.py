"""The noise is torch's, for every length and across calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffoundry.runtime.loop.noise import GENERATORS, PhiloxGenerator, TorchGenerator, philox4x32


def test_known_values():
    values = TorchGenerator(0).randn(16)
    np.testing.assert_allclose(values[:4], [-1.1258, -1.1524, -0.2506, -0.4339], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.one_of(
        st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1, -(2**63)]),
        st.integers(-(2**63), 2**64 - 1),
    ),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
)
def test_stream_equals_torch(seed, lengths):
    ours, theirs = TorchGenerator(seed), torch.Generator().manual_seed(seed)
    for length in lengths:
        np.testing.assert_allclose(
            ours.randn(length), torch.randn(length, generator=theirs).numpy(), atol=2e-6, rtol=2e-6
        )


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 64, 64), (1, 3, 5, 7)])
def test_shape_and_dtype(shape):
    values = TorchGenerator(7).randn(*shape)
    expected = torch.randn(shape, generator=torch.Generator().manual_seed(7)).numpy()
    assert values.shape == shape
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=2e-6, rtol=2e-6)


A100, H100, A6000, A4000 = (sms * threads for sms, threads in ((108, 2048), (132, 2048), (84, 1536), (48, 1536)))
"""Threads that these GPUs hold at once."""


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123, tests/kat_vectors."""
    assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_cuda_known_values():
    """AUTOMATIC1111/stable-diffusion-webui, modules/rng_philox.py."""
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    values = PhiloxGenerator(0).randn(3, 4)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, expected, atol=1e-6)


@pytest.mark.parametrize(("threads", "last"), [(H100, [-0.6970, -0.7780, 0.3267]), (A100, [0.1549, -0.6797, -0.1656])])
def test_cuda_beyond_one_value_a_thread(threads, last):
    """pytorch/pytorch issue 143086: the same seed on an H100 and an A100, each thread called several times."""
    values = PhiloxGenerator(1, threads).randn(1, 49 * 12 * 112 * 144)[0]
    np.testing.assert_allclose(values[:3], [-0.2963, 2.6764, -0.1408], atol=1e-4)
    np.testing.assert_allclose(values[-3:], last, atol=1e-4)


def test_cuda_four_values_a_thread():
    """pytorch/pytorch issue 97097: `normal_(5, 5**.5)` on an RTX A4000, whose threads are fewer than the elements."""
    values = PhiloxGenerator(14, A4000).randn(1000, 100) * np.sqrt(5) + 5
    np.testing.assert_allclose(values[0, :3], [2.8731, 5.2727, 2.9889], atol=1e-4)
    np.testing.assert_allclose(values[-1, -3:], [8.2207, 6.5395, 4.2604], atol=1e-4)


def test_cuda_one_value_a_thread_on_any_gpu():
    """pytorch/pytorch issue 62467, on an RTX A6000."""
    values = PhiloxGenerator(43).randn(1, 3, 128, 128)
    np.testing.assert_allclose(values[0, :, 0, 0], [1.9983, 0.8704, 2.1127], atol=1e-4)
    np.testing.assert_array_equal(values, PhiloxGenerator(43, A6000).randn(1, 3, 128, 128))


def test_cuda_successive_draws():
    """Triton's tutorial 03-matrix-multiplication on an A100: the float16 product of two draws from seed 0."""
    generator = PhiloxGenerator(0, A100)
    a, b = (generator.randn(512, 512).astype(np.float16).astype(np.float32) for _ in range(2))
    product = a @ b
    np.testing.assert_allclose(product[0, :3], [-10.9531, -4.7109, 15.6953], rtol=1e-3)
    np.testing.assert_allclose(product[-1, -3:], [21.5469, -30.2344, -13.2188], rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**64 - 1), blocks=st.integers(1, 3), lengths=st.lists(st.integers(0, 9000), max_size=3)
)
def test_cuda_layout_is_that_of_the_kernel(seed, blocks, lengths):
    """Element by element as ATen's grid-stride loop assigns them, with the offset that each draw moves on by."""
    generator, offset = PhiloxGenerator(seed, 256 * blocks), 0
    for length in lengths:
        values = generator.randn(length)
        stride = min(256 * blocks, -(-length // 256) * 256)
        for element in {0, stride - 1, stride, length // 2, length - 1} & set(range(length)):
            call, rest = divmod(element, 4 * stride)
            lane, thread = divmod(rest, stride)
            words = philox4x32((offset // 4 + call, 0, thread, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
            u, v = ((int(word) + 0.5) / 2**32 for word in words[lane // 2 * 2 :][:2])
            wave = np.cos(2 * np.pi * v) if lane % 2 else np.sin(2 * np.pi * v)
            assert values[element] == pytest.approx(np.sqrt(-2 * np.log(u)) * wave, abs=1e-3)
        offset += ((length - 1) // (4 * stride) + 1) * 4 if length else 0


@pytest.mark.parametrize("device", GENERATORS)
def test_draws_differ_and_are_standard_normal(device):
    generator = GENERATORS[device](5)
    draws = [generator.randn(4, 64, 64) for _ in range(2)] + [GENERATORS[device](6).randn(4, 64, 64)]
    for draw in draws:
        assert abs(draw.mean()) < 0.04
        assert abs(draw.std() - 1) < 0.03
        assert abs((draw**4).mean() - 3) < 0.3
    assert np.abs(np.corrcoef([draw.ravel() for draw in draws]) - np.eye(3)).max() < 0.04
