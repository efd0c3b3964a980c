"""The machine that is measured: what it is made of, and what it reaches at its best, measured in the same run."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import FULL
from ..common.errors import DiffoundryError
from ..common.machine import available_memory, processor
from ..engines.names import ONNXRUNTIME, OPENVINO, EngineName
from ..engines.onnxruntime import OnnxRuntimeEngine, default_threads
from .report import Clock, Gpu, Machine, Peaks

_SETS = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "amx_fp16": "amx_fp16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
"""Flags of /proc/cpuinfo that decide how fast products of matrices are, and what they are called here."""
_SIDE = 2048
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 10, 0.5
"""Of what is measured at its best: as many as take so many seconds, within these limits."""
_LEAST_COPIED, _CACHES = 256 << 20, 4
"""A copy is of as many bytes at least, and of so many times the largest cache."""
_ONNX_FLOAT, _ONNX_HALF = 1, 10
_CALLS_ON_GPU = 20
"""Products that are enqueued before they are waited for."""


def describe(engine: EngineName, versions: dict[str, str]) -> Machine:
    """This machine. versions: of what runs on it. The peaks are measured by `peaks`."""
    info = _cpuinfo()
    return Machine(
        processor=processor(),
        cores=default_threads(),
        instruction_sets=_instruction_sets(info),
        clock_mhz=_clock(info),
        memory_bytes=_memory(),
        gpu=None if engine.on_cpu or engine.backend == OPENVINO else _gpu(),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=versions,
        load=_load(),
    )


def peaks(engine: EngineName, precisions: Iterable[str], threads: int) -> tuple[Peaks, list[str]]:
    """The peaks of the machine, and why some were not measured. precisions: of the products of matrices."""
    found: dict[str, float] = {}
    missing = []
    for precision in dict.fromkeys(precisions):
        try:
            found[precision] = matmul_flops_per_s(engine, precision, threads)
        except Exception as error:  # whatever an engine raises: the figures go without their share
            line = " ".join(str(error).split()) or type(error).__name__
            missing.append(f"the peak of products in {precision} was not measured: {line[:200]}")
    return Peaks(found, copy_bytes_per_s(threads) if engine.on_cpu else None), missing


def matmul_flops_per_s(engine: EngineName, precision: str, threads: int, side: int = _SIDE) -> float:
    """Operations a second of a product of square matrices, by the engine that runs the bundle; the best of some.

    The second matrix is a constant, as a layer's weights are. Raises what the engine raises, for one where this is not
    measured `DiffoundryError`.
    """
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((side, side)).astype(np.float32) for _ in range(2))
    calls = 1 if engine.on_cpu else _CALLS_ON_GPU
    if engine.backend == OPENVINO:
        run = _openvino_product(left, right, precision, threads)
    elif engine.backend == ONNXRUNTIME:
        run = _onnxruntime_product(left, right, precision, threads, engine.provider, calls)
    else:
        raise DiffoundryError(f"{engine} has no measure for it")
    return 2 * side**3 * calls / _best(run)


def copy_bytes_per_s(threads: int) -> float:
    """Bytes read and written a second while an array larger than the caches is copied by all threads; the best."""
    size = max(_LEAST_COPIED, _CACHES * _largest_cache())
    free = available_memory()
    if free is not None:
        size = min(size, free // 8)
    source = np.ones(size // 8, np.float64)
    target = np.zeros_like(source)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        seconds = _best(lambda: list(pool.map(lambda pair: np.copyto(*pair), parts)))
    return 2 * source.nbytes / seconds


def _best(run: Callable[[], object]) -> float:
    """The least seconds of some calls, after one that is not counted."""
    run()
    taken: list[float] = []
    while len(taken) < _LEAST_ROUNDS or (len(taken) < _MOST_ROUNDS and sum(taken) < _SECONDS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _onnxruntime_product(
    left: np.ndarray[Any, Any], right: np.ndarray[Any, Any], precision: str, threads: int, provider: str, calls: int
) -> Callable[[], object]:
    dtype = np.float16 if precision == "fp16" else np.float32
    if precision not in (FULL, "fp16"):
        raise DiffoundryError(f"ONNX Runtime has no {precision} here")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        path.write_bytes(product_model(right.astype(dtype)))
        engine = OnnxRuntimeEngine.load(path, component="product", provider=provider, threads=threads)
    tensors = {"x": engine.to_device(left.astype(dtype)), "y": engine.to_device(np.zeros(left.shape, dtype))}
    binding = engine.bind_device(tensors)

    def run() -> None:
        for _ in range(calls):
            binding()
        if provider != "cpu":
            tensors["y"].numpy()  # which waits

    return run


def _openvino_product(
    left: np.ndarray[Any, Any], right: np.ndarray[Any, Any], precision: str, threads: int
) -> Callable[[], object]:
    import openvino

    types = {FULL: "f32", "fp16": "f16", "bf16": "bf16"}
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        path.write_bytes(product_model(right))
        options = {"INFERENCE_PRECISION_HINT": types[precision], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(left, shared_memory=True))
    return lambda: request.infer()


def product_model(weights: np.ndarray[Any, Any]) -> bytes:
    """An ONNX model of y = x · weights, for float32 or float16 and square matrices: Protocol Buffers by hand.

    The module `onnx` would write it too, and what runs a bundle does without.
    """
    kind = _ONNX_HALF if weights.dtype == np.float16 else _ONNX_FLOAT
    shape = b"".join(_field(1, _number(1, side)) for side in weights.shape)

    def value(name: str) -> bytes:
        return _field(1, name.encode()) + _field(2, _field(1, _number(1, kind) + _field(2, shape)))

    node = _field(1, b"x") + _field(1, b"w") + _field(2, b"y") + _field(4, b"MatMul")
    tensor = b"".join(_number(1, side) for side in weights.shape) + _number(2, kind)
    tensor += _field(8, b"w") + _field(9, np.ascontiguousarray(weights).tobytes())
    graph = _field(1, node) + _field(2, b"g") + _field(5, tensor) + _field(11, value("x")) + _field(12, value("y"))
    return _number(1, 8) + _field(7, graph) + _field(8, _field(1, b"") + _number(2, 17))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])


def _cpuinfo() -> dict[str, list[str]]:
    """The lines of /proc/cpuinfo by their names; {} where there is none."""
    found: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def _instruction_sets(info: dict[str, list[str]]) -> tuple[str, ...]:
    flags = set((info.get("flags") or info.get("Features") or [""])[0].split())
    return tuple(name for flag, name in _SETS.items() if flag in flags)


def _clock(info: dict[str, list[str]]) -> Clock | None:
    """From the kernel's files, or /proc/cpuinfo; None where neither tells."""
    folders = sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    now = [value / 1e3 for folder in folders if (value := _read_number(folder / "scaling_cur_freq"))]
    most = [value / 1e3 for folder in folders if (value := _read_number(folder / "cpuinfo_max_freq"))]
    if not now:
        with contextlib.suppress(ValueError):
            now = [float(text) for text in info.get("cpu MHz", [])]
    if not now and not most:
        return None
    return Clock(sum(now) / len(now) if now else None, max(most) if most else None)


def _read_number(path: Path) -> float | None:
    with contextlib.suppress(OSError, ValueError):
        return float(path.read_text())
    return None


def _largest_cache() -> int:
    """Bytes of the largest cache of one processor, 0 where the kernel does not say."""
    units, largest = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}, 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            text = path.read_text().strip()
            largest = max(largest, int(text[:-1]) * units[text[-1]])
    return largest


def _memory() -> int | None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _load() -> float | None:
    with contextlib.suppress(AttributeError, OSError):
        return round(os.getloadavg()[0], 2)
    return None


def _gpu() -> Gpu | None:
    with contextlib.suppress(DiffoundryError):
        from ..engines.gpu.gpu import shared

        device = shared().device
        return Gpu(device.name, int(device.call("cudaMemGetInfo")[1]))
    return None
