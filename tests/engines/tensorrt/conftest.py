"""A simulated GPU for the tests of this folder."""

from __future__ import annotations

import pytest

from diffoundry.engines.tensorrt import cuda
from diffoundry.engines.tensorrt.backend import Backend
from diffoundry.engines.tensorrt.gpu import Gpu
from diffoundry.tests.engines.tensorrt.simulated import SimulatedCuda, SimulatedTensorRT


@pytest.fixture
def simulated_cuda(monkeypatch):
    """A stand-in for cuda-python, in place of it."""
    simulated = SimulatedCuda()
    monkeypatch.setattr(cuda, "bindings", lambda: simulated)
    return simulated


@pytest.fixture
def trt(simulated_cuda, monkeypatch):
    """A stand-in for the TensorRT modules, in place of both."""
    module = SimulatedTensorRT(simulated_cuda)
    monkeypatch.setattr(Backend, "load", lambda backend: module)
    return module


@pytest.fixture
def gpu(trt):
    """The simulated GPU, opened."""
    return Gpu()
