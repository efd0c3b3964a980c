"""What a finished plan is made of, read from TensorRT's own description of its layers.

On a GPU the engine inspector gives it as JSON. Ahead of time there is none to ask: there the builder writes the same
description to its log.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$", re.MULTILINE)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_PART = re.compile(r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs|TacticName|[A-Z]\w+): |$)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TACTIC = re.compile(r"TacticName: ([^,]*)")
_MEMORY = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")
_PRECISIONS = {
    "Float": "fp32",
    "FP32": "fp32",
    "Half": "fp16",
    "FP16": "fp16",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Int8": "int8",
    "INT8": "int8",
    "FP8": "fp8",
}
_HEAVY_KINDS = ("correlation", "gemm", "convolution", "caskconvolution", "caskgemmconvolution", "matrixmultiply")
_HEAVY_NAMES = ("mha", "_fc", "conv", "gemm")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. precision: of its first floating-point input, "" for one that computes sizes or indices.

    nodes: the ONNX nodes that went into it.
    """

    name: str
    kind: str
    precision: str
    nodes: tuple[str, ...]
    tactic: str = ""

    @property
    def heavy(self) -> bool:
        """Whether it is a convolution, a matrix product or an attention: where the precision decides the time."""
        name = self.name.lower()
        return self.kind.lower() in _HEAVY_KINDS or (
            self.kind != "shape_call" and any(part in name for part in _HEAVY_NAMES)
        )

    @property
    def attention(self) -> bool:
        """Whether it is a whole attention in one kernel."""
        return "mha" in self.name.lower() or "mha" in self.kind.lower()


def is_described(message: str) -> bool:
    """Whether a line of the builder's log is one for `from_log` or `memory_of`."""
    return "LayerType: " in message or _MEMORY.search(message) is not None


def from_log(messages: Iterable[str]) -> list[Layer]:
    """The layers that the builder's log describes."""
    return [_layer(found) for message in messages for found in _LINE.finditer(message)]


def _layer(found: re.Match[str]) -> Layer:
    rest = found["rest"]
    parts = {name: _DATATYPE.findall(text) for name, text in _PART.findall(rest)}
    types = [*parts.get("Inputs", []), *parts.get("Outputs", [])] or _DATATYPE.findall(rest)
    tactic = _TACTIC.search(rest)
    nodes = tuple(dict.fromkeys(_NODE.findall(rest)))
    return Layer(found["name"], found["kind"], _precision(types), nodes, tactic[1] if tactic else "")


def from_inspector(text: str) -> list[Layer]:
    """The layers in the engine inspector's JSON; [] when it holds names alone or nothing."""
    try:
        described = json.loads(text)["Layers"]
    except (ValueError, LookupError, TypeError):
        return []
    if not isinstance(described, list) or not all(isinstance(item, dict) for item in described):
        return []
    layers = []
    for item in described:
        tensors = [*item.get("Inputs", []), *item.get("Outputs", [])]
        types = [word for tensor in tensors for word in str(_type_of(tensor)).replace("/", " ").split()]
        nodes = tuple(dict.fromkeys(_NODE.findall(str(item.get("Metadata", "")))))
        layers.append(
            Layer(
                str(item.get("Name", "")),
                str(item.get("LayerType", "")),
                _precision(types),
                nodes,
                str(item.get("TacticName", "")),
            )
        )
    return layers


def _type_of(tensor: Any) -> Any:
    if not isinstance(tensor, dict):
        return ""
    return tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("DataType") or ""


def _precision(types: Sequence[str]) -> str:
    return next((_PRECISIONS[name] for name in types if name in _PRECISIONS), "")


def memory_of(messages: Iterable[str]) -> dict[str, int]:
    """Bytes of weights and activations that the builder's log names: {"weights": …, "activation": …}."""
    return {found[1].lower(): int(found[2]) for message in messages for found in _MEMORY.finditer(message)}


def summary(layers: Sequence[Layer], precision: str, attentions: int, fp32_nodes: Iterable[str] = ()) -> dict[str, Any]:
    """Layers by precision, attention in one kernel or not, and the heavy layers that did not get `precision`.

    attentions: how many the model has. fp32_nodes: ONNX nodes that are in fp32 on purpose.
    """
    fused = sum(layer.attention for layer in layers)
    heavy = [layer for layer in layers if layer.heavy and layer.precision]
    other = [layer for layer in heavy if layer.precision != precision]
    on_purpose = set(fp32_nodes)
    return {
        "layers": dict(sorted(Counter(layer.precision or "other" for layer in layers).items())),
        "heavy": dict(sorted(Counter(layer.precision for layer in heavy).items())),
        "attention": {"fused": min(fused, attentions), "of": attentions},
        "not_in_precision": [layer.name for layer in other if on_purpose.isdisjoint(layer.nodes)],
    }
