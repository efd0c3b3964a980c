"""The layer over cuda-python: errors in words, memory that is given back, captured launches. On a simulated GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from diffoundry.common.errors import EngineError
from diffoundry.engines.gpu import device as cuda
from diffoundry.engines.gpu.device import Device
from diffoundry.engines.gpu.gpu import Arena, CapturedLaunches, Gpu, shared
from diffoundry.tests.engines.tensorrt.simulated import SimulatedCuda

SOURCES = sorted(Path(cuda.__file__).parent.glob("*.py"))


@pytest.fixture
def device(simulated_cuda):
    return Device()


def fill(device, address, byte, size):
    """Work for the stream of `device`."""
    device.call("cudaMemsetAsync", address, byte, size, device.stream)


def test_the_gpu_is_described(device):
    assert (device.name, device.arch, device.driver, device.runtime) == ("Simulated GPU", "sm89", "13.0", "13.0")


@pytest.mark.parametrize(
    ("simulated", "message"),
    [
        (SimulatedCuda(driver=0), "^no NVIDIA GPU or driver on this machine: run with `--engine onnxruntime`$"),
        (SimulatedCuda(devices=0), "^no NVIDIA GPU or driver on this machine: run with `--engine onnxruntime`$"),
        (SimulatedCuda(driver=12040), "takes CUDA up to 12.4, cuda-python is for 13.0: update the driver"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_one_clear_line(monkeypatch, simulated, message):
    monkeypatch.setattr(cuda, "bindings", lambda: simulated)
    with pytest.raises(EngineError, match=message) as caught:
        Device()
    assert "\n" not in str(caught.value)


def test_cuda_python_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineError, match=r"which is missing .*: run `pip install cuda-python`$"):
        Device()


def test_this_machine_without_a_gpu_gives_that_line():
    real = pytest.importorskip("cuda.bindings.runtime")
    if real.cudaGetDeviceCount()[0] == real.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"^(no NVIDIA GPU or driver on this machine|the NVIDIA driver takes)"):
        Device()


def test_memory_is_given_back(simulated_cuda, device):
    memory = device.allocate(1000, "a test")
    assert simulated_cuda.used == 1000 and memory.address % 256 == 0
    memory.close()
    memory.close()
    assert simulated_cuda.used == 0
    memory = device.allocate(1000, "a test")
    del memory
    assert simulated_cuda.used == 0
    assert simulated_cuda.calls["cudaFree"] == 2


def test_too_little_memory_is_told_with_the_remedies(simulated_cuda, device):
    simulated_cuda.memory = 3 << 30
    with pytest.raises(EngineError, match=r"the U-Net needs 4.00 GiB, 3.00 GiB of 3.00 GiB are free"):
        device.allocate(4 << 30, "the U-Net")
    with pytest.raises(EngineError, match="smaller size or batch, split guidance or a tiled autoencoder"):
        device.allocate(4 << 30, "the U-Net")


def test_copies_go_both_ways(device):
    source = np.arange(24, dtype=np.float32)
    memory = device.allocate(source.nbytes, "a test")
    fill(device, memory.address, 0, memory.size)
    device.upload(memory.address + 16, source[:8])
    found = np.empty_like(source)
    device.download(found, memory.address)
    device.synchronize()
    np.testing.assert_array_equal(found, [0] * 4 + list(range(8)) + [0] * 12)


def test_memory_that_is_gone_is_an_error_in_words(device):
    memory = device.allocate(64, "a test")
    address = memory.address
    memory.close()
    fill(device, address, 0, 64)
    with pytest.raises(EngineError, match=r"cudaStreamSynchronize failed on Simulated GPU: .*cudaErrorIllegalAddress"):
        device.synchronize()


def test_what_is_captured_runs_when_it_is_launched(simulated_cuda, device):
    memory = device.allocate(4, "a test")
    fill(device, memory.address, 1, 4)
    graph = device.capture(lambda: fill(device, memory.address, 7, 4))
    found = np.empty(4, np.uint8)
    device.download(found, memory.address)
    device.synchronize()
    assert found.tolist() == [1] * 4
    device.launch(graph)
    device.download(found, memory.address)
    device.synchronize()
    assert found.tolist() == [7] * 4
    assert len(simulated_cuda.graphs) == 1
    graph.close()
    assert not simulated_cuda.graphs


def test_what_is_dropped_during_a_capture_is_freed_after_it(simulated_cuda, device):
    kept = device.allocate(4, "a test")
    dropped = [device.allocate(4, "a test")]

    def launches():
        dropped.clear()
        fill(device, kept.address, 7, 4)

    device.launch(device.capture(launches))
    device.synchronize()
    assert simulated_cuda.used == 4


def test_a_capture_that_fails_ends(simulated_cuda, device):
    def wrong():
        device.allocate(4, "a test")

    with pytest.raises(EngineError, match="a test: memory cannot be asked for while launches are captured"):
        device.capture(wrong)
    with pytest.raises(EngineError, match="cudaStreamSynchronize failed"):
        device.capture(device.synchronize)
    assert not device.capturing and not simulated_cuda.capturing and not simulated_cuda.graphs
    device.synchronize()


def test_the_arena_grows_to_the_largest_need(simulated_cuda, device):
    arena = Arena(device)
    arena.grow(1000, "a")
    first, generation = arena.address, arena.generation
    arena.grow(500, "b")
    assert (arena.address, arena.generation, arena.size) == (first, generation, 1000)
    arena.grow(2000, "c")
    assert arena.generation == generation + 1
    assert simulated_cuda.used == arena.size == 2000
    with pytest.raises(EngineError, match=r"the activations of d needs? 2.00 GiB"):
        arena.grow(2 << 30, "d")
    assert simulated_cuda.used == arena.size == 0
    arena.grow(100, "a")
    assert arena.size == 256
    with pytest.raises(EngineError, match="e: its activations have outgrown their memory while launches are captured"):
        device.capture(lambda: arena.grow(1000, "e"))
    assert arena.size == simulated_cuda.used == 256


def test_a_tensor_holds_what_it_was_given(simulated_cuda):
    gpu = Gpu()
    strided = np.arange(12, dtype=np.int64).reshape(3, 4).T
    tensor = gpu.to_device(strided)
    np.testing.assert_array_equal(tensor.numpy(), strided)
    array = np.ones((4, 3), np.int64)
    tensor.update_inplace(array)
    array[:] = 5  # the copy was made
    assert tensor.numpy().sum() == 12
    for wrong in (np.ones((3, 4), np.int64), np.ones((4, 3), np.float32)):
        with pytest.raises(EngineError, match="on the GPU cannot hold"):
            tensor.update_inplace(wrong)
    del tensor
    assert simulated_cuda.used == 0


def test_recorded_launches_are_plain_at_first_then_one_graph(simulated_cuda):
    gpu = Gpu()
    tensor, turns = gpu.to_device(np.zeros(4, np.uint8)), []

    def launches():
        turns.append(len(turns))
        fill(gpu.device, tensor.address, 10 + len(turns), 4)

    recorded = CapturedLaunches(gpu, launches)
    recorded()
    assert (tensor.numpy()[0], turns, simulated_cuda.calls["cudaGraphLaunch"]) == (11, [0], 0)
    for launched in (1, 2):
        tensor.update_inplace(np.zeros(4, np.uint8))
        recorded()
        assert (tensor.numpy()[0], turns, simulated_cuda.calls["cudaGraphLaunch"]) == (12, [0, 1], launched)
    gpu.invalidate_graphs()
    recorded()
    assert (tensor.numpy()[0], turns, simulated_cuda.calls["cudaGraphLaunch"]) == (13, [0, 1, 2], 2)
    assert not simulated_cuda.graphs
    recorded()
    assert (tensor.numpy()[0], turns, simulated_cuda.calls["cudaGraphLaunch"]) == (14, [0, 1, 2, 3], 3)


def test_launches_that_move_the_arena_are_not_captured_before_it_rests(simulated_cuda):
    gpu, needs = Gpu(), [1000] * 4
    recorded = CapturedLaunches(gpu, lambda: gpu.arena.grow(needs.pop(0), "a test"))
    for captures in (0, 0, 1):
        recorded()
        assert simulated_cuda.calls["cudaStreamBeginCapture"] == captures
    assert needs == [1000]


def test_launches_that_cannot_be_captured_are_made_one_by_one_and_it_is_said(simulated_cuda):
    gpu, done = Gpu(), []

    def launches():
        gpu.device.synchronize()
        done.append(1)

    recorded = CapturedLaunches(gpu, launches)
    recorded()
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph and are launched one by one: cudaStr"):
        recorded()
    recorded()
    assert len(done) == 3
    assert simulated_cuda.calls["cudaStreamBeginCapture"] == 1


def test_all_of_a_process_share_a_gpu(simulated_cuda):
    gpu = shared()
    assert shared() is gpu
    del gpu
    assert shared() is not None
    assert len(simulated_cuda.streams) <= 1


def test_what_is_used_of_cuda_python_is_there():
    real = pytest.importorskip("cuda.bindings.runtime")
    text = "\n".join(path.read_text() for path in SOURCES)
    names = set(re.findall(r"\b(cuda[A-Z]\w+)", text))
    members = {
        **real.cudaDeviceAttr.__members__,
        **real.cudaError_t.__members__,
        **real.cudaMemcpyKind.__members__,
        **real.cudaStreamCaptureMode.__members__,
    }
    assert len(names) > 20
    assert [name for name in sorted(names) if not hasattr(real, name) and name not in members] == []
