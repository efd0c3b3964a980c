"""The noise is torch's, for every length and across calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffoundry.runtime.noise import TorchGenerator


def test_known_values():
    values = TorchGenerator(0).randn(16)
    np.testing.assert_allclose(values[:4], [-1.1258, -1.1524, -0.2506, -0.4339], atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1]), st.integers(0, 2**63 - 1)),
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
