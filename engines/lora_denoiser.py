"""The denoiser that takes the factors of LoRAs as inputs: the bundle's, or one made of the plain one in memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import FULL, STANDARD, Bundle
from ..bundle.wiring import MOST_RANK, LoraInputs
from ..common.errors import EngineError
from .changed import WEIGHTS_NAME, NewValue, sources_of
from .engine import Engine
from .split import SplitEngine

NAME = "{}_lora"
"""The name of the component, after the denoiser."""
_LIBRARY = "onnx_ir"
_ATTENTION = frozenset({0})
"""The first group of layers, which every denoiser has."""


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph in memory, whose large weights lie in files. weights: the names of its initializers."""

    content: bytes
    weights: frozenset[str]


@dataclass(frozen=True, slots=True)
class Made:
    """A denoiser in memory. source: the model that it was made of, beside which its weights lie.

    groups: of layers, those that take factors; see `fusion.lora.group_of`. sizes: the rows of both of its inputs for
    factors. per_prompt: what is computed once for a prompt, None where nothing is.
    """

    source: Path
    groups: frozenset[int]
    inputs: LoraInputs
    sizes: tuple[int, int]
    model: Graph
    per_prompt: Graph | None


class LoraDenoiser:
    """The denoiser of a bundle that takes LoRAs as inputs. Where the bundle has none, it is made when it is needed.

    Only the graph is made, which takes about a second; its weights are those of the plain denoiser. Groups of layers
    that no LoRA has changed so far take no factors and cost nothing: the first LoRA that changes one has the graph made
    anew. Each is a layout, numbered from 1; a later one takes all that those before it do. The bundle's own is 1.
    """

    def __init__(self, bundle: Bundle, on_cpu: bool) -> None:
        """on_cpu: whether the engine is ONNX Runtime on the CPU, in fp32."""
        manifest = bundle.manifest
        self._bundle, self._denoiser = bundle, manifest.named("denoiser")
        self._inputs = next(iter(manifest.wiring.lora_inputs.values()), None)
        self.built = self._inputs is not None
        """Whether it is of the bundle."""
        self.name = next(iter(manifest.wiring.lora_inputs), NAME.format(self._denoiser))
        """Of its component."""
        known = f"{self._denoiser}/{WEIGHTS_NAME}" in manifest.components[self._denoiser].files
        self._able = on_cpu and known and not bundle.foreign and self.name not in manifest.components
        self._made: tuple[Made, ...] = ()

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
    def layout(self) -> int:
        """The last one, 0 where there is none yet."""
        return 1 if self.built else len(self._made)

    def layout_for(self, groups: frozenset[int]) -> int:
        """One that takes factors for these groups of layers, attention where a LoRA changes texts alone.

        Raises `EngineError` where none can be made.
        """
        groups = groups or _ATTENTION
        before = self._made[-1].groups if self._made else frozenset()
        if not self.built and not (self._made and groups <= before):
            self._made = (*self._made, self._make(before | groups))
        return self.layout

    def inputs(self, layout: int) -> LoraInputs:
        """Its inputs for factors."""
        return self._made[layout - 1].inputs if self._inputs is None else self._inputs

    def sizes(self, layout: int) -> tuple[int, int]:
        """The rows of both inputs."""
        if self._inputs is None:
            return self._made[layout - 1].sizes
        shapes = {tensor.name: tensor.shape for tensor in self._bundle.component(self.name).inputs}
        down, up = (shapes[name][1] for name in (self._inputs.down, self._inputs.up))
        return int(down), int(up)

    def load(self, layout: int, threads: int | None, change: Callable[[Path], Sequence[NewValue]]) -> Engine:
        """The engine of one in memory. change: of a model, the initializers that are others than in the file."""
        from .onnxruntime import OnnxRuntimeEngine

        made = self._made[layout - 1]
        changed = change(made.source)

        def engine_of(graph: Graph) -> Engine:
            own = [each for each in changed if each.initializer.name in graph.weights]
            return OnnxRuntimeEngine.load(
                made.source, component=self.name, threads=threads, changed=own, content=graph.content
            )

        per_step = engine_of(made.model)
        return per_step if made.per_prompt is None else SplitEngine(self.name, engine_of(made.per_prompt), per_step)

    def _make(self, groups: frozenset[int]) -> Made:
        from .fusion.cpu import fuse_model_for_cpu
        from .fusion.graph import open_model
        from .fusion.lora import DOWN, UP, add_lora, group_of, names_of

        if self.lacks:
            raise EngineError(self.lacks)
        bundle, denoiser = self._bundle, self._denoiser
        variant = bundle.component(denoiser).variants[f"{FULL}/{STANDARD}"]
        bundle.check(variant.files, known=True)
        model = open_model(bundle.path(variant.model))
        sources = {key: source.weights for key, source in sources_of(bundle, denoiser).items()}

        def group(weight: str) -> int | None:
            own = group_of(weight)
            return own if own in groups else None

        layers = add_lora(model, names_of(sources), group, spares=True)
        _, part = fuse_model_for_cpu(model, bundle.manifest.per_prompt(denoiser))
        inputs = LoraInputs(MOST_RANK, tuple(each.weight for each in layers), DOWN, UP)
        sizes = sum(each.reads for each in layers), sum(each.gives for each in layers)
        per_prompt = None if part is None else _graph(part)
        return Made(bundle.path(variant.model), groups, inputs, sizes, _graph(model), per_prompt)


def _graph(model: Any) -> Graph:
    import onnx_ir

    names: Sequence[str] = [str(name) for name in model.graph.initializers]
    return Graph(onnx_ir.to_proto(model).SerializeToString(), frozenset(names))
