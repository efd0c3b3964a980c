"""A simulated GPU for the tests of this folder."""

from __future__ import annotations

import pytest

from diffoundry.engines.gpu.gpu import Gpu


@pytest.fixture
def gpu(trt):
    """The simulated GPU, opened."""
    return Gpu()
