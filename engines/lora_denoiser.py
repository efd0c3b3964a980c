"""The denoiser that takes the factors of LoRAs as inputs: the bundle's, or one made of the plain one in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import FULL, STANDARD, Bundle
from ..bundle.wiring import MOST_RANK, LoraInputs
from ..common.errors import EngineError
from .changed import WEIGHTS_NAME, sources_of
from .fusion.cpu import fuse_model_for_cpu
from .fusion.graph import open_model
from .fusion.lora import DOWN, UP, add_lora, group_of, names_of

NAME = "{}_lora"
"""The name of the component, after the denoiser."""
_LIBRARY = "onnx_ir"


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph in memory, whose large weights lie in files. weights: the names of its initializers."""

    content: bytes
    weights: frozenset[str]


@dataclass(frozen=True, slots=True)
class Made:
    """A denoiser in memory. source: the model that it was made of, beside which its weights lie.

    sizes: the rows of both of its inputs for factors. per_prompt: what is computed once for a prompt, None where
    nothing is.
    """

    source: Path
    inputs: LoraInputs
    sizes: tuple[int, int]
    model: Graph
    per_prompt: Graph | None


class LoraDenoiser:
    """The denoiser of a bundle that takes LoRAs as inputs. Where the bundle has none, it is made when it is needed.

    Only the graph is made, which takes about a second; its weights are those of the plain denoiser.
    """

    def __init__(self, bundle: Bundle, on_cpu: bool) -> None:
        """on_cpu: whether the engine is ONNX Runtime on the CPU, in fp32."""
        manifest = bundle.manifest
        self._bundle, self._denoiser = bundle, manifest.named("denoiser")
        built = manifest.wiring.lora_inputs
        self.built = bool(built)
        """Whether it is of the bundle."""
        self.name = next(iter(built), NAME.format(self._denoiser))
        """Of its component."""
        known = f"{self._denoiser}/{WEIGHTS_NAME}" in manifest.components[self._denoiser].files
        self._able = on_cpu and known and not bundle.foreign and self.name not in manifest.components
        self._made: Made | None = None

    @property
    def lacks(self) -> str:
        """Why there is none, with what to do; "" where there is one, or one can be made."""
        root = self._bundle.root
        if self.built or (self._able and importlib.util.find_spec(_LIBRARY) is not None):
            return ""
        build = f"run `diffoundry build {root} --lora-rank 32`"
        remedy = "run `pip install 'diffoundry[build]'`" if self._able else build
        return f"{root} takes no LoRAs as inputs: {remedy}"

    @property
    def inputs(self) -> LoraInputs:
        """Its inputs for factors. Raises `EngineError` where there is none."""
        return next(iter(self._bundle.manifest.wiring.lora_inputs.values())) if self.built else self.made.inputs

    @property
    def sizes(self) -> tuple[int, int]:
        """The rows of both inputs."""
        if not self.built:
            return self.made.sizes
        shapes = {tensor.name: tensor.shape for tensor in self._bundle.component(self.name).inputs}
        down, up = (shapes[name][1] for name in (self.inputs.down, self.inputs.up))
        return int(down), int(up)

    @property
    def made(self) -> Made:
        """The one in memory. Raises `EngineError` where none can be made."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> Made:
        if self.built or self.lacks:
            raise EngineError(self.lacks or f"{self._bundle.root} has {self.name} already")
        bundle, denoiser = self._bundle, self._denoiser
        variant = bundle.component(denoiser).variants[f"{FULL}/{STANDARD}"]
        bundle.check(variant.files, known=True)
        model = open_model(bundle.path(variant.model))
        sources = {key: source.weights for key, source in sources_of(bundle, denoiser).items()}
        layers = add_lora(model, names_of(sources), group_of, spares=True)
        if not layers:
            raise EngineError(f"{bundle.root}: its denoiser has no layers that take LoRAs as inputs")
        _, part = fuse_model_for_cpu(model, bundle.manifest.per_prompt(denoiser))
        inputs = LoraInputs(MOST_RANK, tuple(each.weight for each in layers), DOWN, UP)
        sizes = sum(each.reads for each in layers), sum(each.gives for each in layers)
        return Made(bundle.path(variant.model), inputs, sizes, _graph(model), None if part is None else _graph(part))


def _graph(model: Any) -> Graph:
    import onnx_ir

    names: Sequence[str] = [str(name) for name in model.graph.initializers]
    return Graph(onnx_ir.to_proto(model).SerializeToString(), frozenset(names))
