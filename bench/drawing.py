"""A bundle that is loaded and draws, with the time of each stage: what our process of a benchmark does."""

from __future__ import annotations

import io
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..engines import Engine
from ..engines.names import OPENVINO, EngineName
from ..families import open_bundle
from ..runtime.loop.guidance import Guidance
from ..runtime.pipeline import Pipeline
from ..runtime.request import Request
from .report import Stages
from .timing import Call, Recorder, TimedEngine, by_step, stages_of

_SHOWN = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "numpy")


def versions() -> dict[str, str]:
    """The versions of diffoundry and of what it runs with here."""
    found = {"diffoundry": __version__}
    for name in _SHOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Drawer:
    """A loaded bundle. Its pictures come with the seconds of their stages.

    peak_gpu: the most bytes of an NVIDIA GPU that it was seen to have, None where it uses none.
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        """asked: `bundle`, `engine`, `precision`, `threads` and `scheduler`, as the protocol has them.

        Raises `DiffoundryError` when the bundle cannot be loaded.
        """
        self._recorder = Recorder()
        self._pipeline = Pipeline(
            open_bundle(asked["bundle"]),
            engine=asked.get("engine"),
            precision=asked.get("precision"),
            threads=asked.get("threads"),
            wrap=self._timed,
        )
        self._scheduler = asked.get("scheduler")
        self._roles = {name: part.role for name, part in self._pipeline.bundle.manifest.components.items()}
        engine = EngineName.parse(self.info()["engine"])
        self._by_step, self._by_cuda = engine.on_cpu, not engine.on_cpu and engine.backend != OPENVINO
        self._free = self._free_gpu_memory()
        self.peak_gpu: int | None = None

    def info(self) -> dict[str, Any]:
        """What runs the bundle: `engine`, `precision` and the like."""
        return self._pipeline.info()

    def draw(self, asked: dict[str, Any], *, by_step: bool = False) -> dict[str, Any]:
        """Draw pictures into the file `asked["image"]` and give the answer of the protocol.

        by_step: wait for each step where the loop runs on a GPU, which takes longer; on the CPU it is done anyway.
        Raises `DiffoundryError` for what the bundle cannot do.
        """
        request = Request(
            asked["prompt"],
            asked.get("negative_prompt"),
            steps=asked["steps"],
            guidance=Guidance(asked["guidance"]),
            scheduler=self._scheduler,
            seed=asked["seed"],
            count=asked["count"],
            width=asked["width"],
            height=asked["height"],
        )
        self._recorder.take()
        ends: list[float] = []
        first_step = None
        start, clock = time.perf_counter(), time.time()
        if self._by_step or by_step:
            run = self._pipeline.steps(request)
            for _ in run:
                ends.append(time.perf_counter())
            result = run.result
            first_step = clock + ends[0] - start
        else:
            result = self._pipeline.generate(request)
        end = time.perf_counter()
        calls = self._recorder.take()
        file = io.BytesIO()
        np.save(file, np.stack([np.asarray(image) for image in result.images]))
        Path(asked["image"]).write_bytes(file.getvalue())  # NumPy's own writing does not say that a disk is full
        self._note_gpu_memory()
        stages = stages_of(calls, self._roles, start, ends, end, result.seconds.get("text"))
        return {
            "seconds": end - start,
            "stages": _written(stages),
            "at": {"first_step": first_step, "end": clock + end - start},
            "calls": self._calls(calls, ends),
        }

    def _timed(self, name: str, engine: Engine) -> Engine:
        return TimedEngine(name, engine, self._recorder)

    def _calls(self, calls: list[Call], ends: list[float]) -> list[dict[str, Any]]:
        """The calls of a picture: component, seconds, and the shapes of the inputs; those of a step as one."""
        found: list[Call] = [call for call in calls if self._roles[call.component] != "denoiser" and not call.binds]
        steps = by_step([call for call in calls if self._roles[call.component] == "denoiser"], ends)
        found += [call for call in steps if call is not None]
        return [
            {"component": call.component, "seconds": call.end - call.start, "shapes": call.shapes} for call in found
        ]

    def _free_gpu_memory(self) -> int | None:
        if not self._by_cuda:
            return None
        from ..engines.gpu.gpu import shared

        return int(shared().device.call("cudaMemGetInfo")[0])

    def _note_gpu_memory(self) -> None:
        free = self._free_gpu_memory()
        if free is not None and self._free is not None:
            self.peak_gpu = max(self.peak_gpu or 0, self._free - free)


def _written(stages: Stages) -> dict[str, Any]:
    """The stages as the protocol has them, those that are known."""
    values = {name: getattr(stages, name) for name in Stages.__slots__}
    return {name: value for name, value in values.items() if value is not None and value != ()}
