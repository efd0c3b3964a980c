"""OpenVINO GenAI's text-to-image pipeline on the CPU, on models that optimum-intel converts once.

`openvino_genai_peer.py --convert CHECKPOINT FOLDER` is the converting, which runs in a process of its own: the memory of
this one is then what drawing takes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .protocol import Array, Asked, Clock, Loaded, Refused, checkpoint_of, device_of, precision_of
    from .protocol import scheduler_config, serve
else:
    from protocol import Array, Asked, Clock, Loaded, Refused, checkpoint_of, device_of, precision_of
    from protocol import scheduler_config, serve

_PACKAGES = ("openvino-genai", "openvino", "openvino-tokenizers", "optimum-intel", "numpy")
_TYPES = {"fp32": "f32", "bf16": "bf16"}
_SCHEDULERS = {
    "EulerDiscreteScheduler": "EULER_DISCRETE",
    "EulerAncestralDiscreteScheduler": "EULER_ANCESTRAL_DISCRETE",
    "DDIMScheduler": "DDIM",
    "PNDMScheduler": "PNDM",
    "LCMScheduler": "LCM",
    "FlowMatchEulerDiscreteScheduler": "FLOW_MATCH_EULER_DISCRETE",
}
_NAMES = "euler, euler_a, ddim, plms or lcm"


class OpenVinoGenAi:
    """A pipeline of OpenVINO GenAI, compiled for the size that is asked for."""

    def __init__(self) -> None:
        """Import what is needed."""
        import openvino
        import openvino_genai

        self._openvino, self._genai, self._pipeline = openvino, openvino_genai, None

        class Given(openvino_genai.Generator):  # type: ignore[misc]
            """Gives the latents first, and after them what torch's generator would."""

            def __init__(self, latents: Array, seed: int) -> None:
                super().__init__()
                self._latents: Array | None = latents
                self._torch = openvino_genai.TorchGenerator(seed)

            def next(self) -> float:
                return float(self._torch.next())

            def randn_tensor(self, shape: Any) -> Any:
                drawn = self._torch.randn_tensor(shape)
                latents, self._latents = self._latents, None
                if latents is None:
                    return drawn
                return openvino.Tensor(np.ascontiguousarray(latents.reshape(tuple(shape)), np.float32))

        self._given = Given

    def load(self, asked: Asked) -> Loaded:
        """Convert the checkpoint where that was not done before, and compile its models for the size asked for."""
        self._pipeline = None
        precision, _ = precision_of(asked, tuple(_TYPES)), device_of(asked)
        capabilities = self._openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in capabilities:
            raise Refused("this processor has no bf16: choose --precision fp32")
        checkpoint, work = checkpoint_of(asked), Path(asked["work"])
        config = scheduler_config(asked, checkpoint)
        kind = _SCHEDULERS.get(str(config.get("_class_name")))
        if kind is None:
            raise Refused(f"it has no {config.get('_class_name')}: give --scheduler {_NAMES}")
        models = work / "openvino"
        convert_s = _converted(checkpoint, models)
        file = work / "scheduler_config.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        pipeline = self._genai.Text2ImagePipeline(models)
        scheduler = self._genai.Scheduler
        pipeline.set_scheduler(scheduler.from_config(file, getattr(scheduler.Type, kind)))
        self._asked, self._shape = asked, None
        properties = {"INFERENCE_PRECISION_HINT": _TYPES[precision], "PERFORMANCE_HINT": "LATENCY"}
        if asked.get("threads"):
            properties["INFERENCE_NUM_THREADS"] = asked["threads"]
        self._pipeline, self._properties = pipeline, properties
        return Loaded({"device": "CPU", **properties}, convert_s)

    def draw(self, asked: Asked, latents: Array, clock: Clock) -> Array:
        """Pictures, as the pipeline gives them."""
        raise NotImplementedError

    def peak_gpu(self) -> int | None:
        """None: it runs on the CPU."""
        return None


def _converted(checkpoint: str, models: Path) -> float:
    """Seconds that converting the checkpoint to `models` took, 0 where it was there. Raises `Refused`."""
    if models.is_dir():
        return 0.0
    start, part = time.perf_counter(), models.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-E", "-s", __file__, "--convert", checkpoint, str(part)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Refused(f"optimum-intel cannot convert {checkpoint}: {said[-1] if said else done.returncode}")
    part.rename(models)
    return time.perf_counter() - start


def _convert(checkpoint: str, folder: str) -> None:
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    main_export(
        checkpoint,
        Path(folder),
        task="text-to-image",
        library_name="diffusers",
        ov_config=OVConfig(dtype="fp32"),
        convert_tokenizer=True,
        local_files_only=True,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        _convert(sys.argv[2], sys.argv[3])
    else:
        serve(OpenVinoGenAi, _PACKAGES)
