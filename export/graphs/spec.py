"""What a model family says about one of its components, for tracing and validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Tensor
from ...common.arrays import Array

OPSET = 20
"""The ONNX operator set that is traced to."""


def argument(name: str) -> str:
    """What an input is called as an argument of a Python function, whose names have no dots."""
    return name.replace(".", "__")


@dataclass(frozen=True, slots=True)
class Axis:
    """Sizes that a named axis may take in a test: multiples of `unit` from `low` to `high`."""

    low: int
    high: int
    unit: int = 1

    def draw(self, rng: np.random.Generator) -> int:
        """A random size."""
        return self.unit * int(rng.integers(-(-self.low // self.unit), self.high // self.unit + 1))


@dataclass(frozen=True, slots=True)
class ComponentSpec:
    """One component: where it comes from, its inputs and outputs with named axes, and how to load it.

    load: returns the torch module, in eval mode, whose keyword arguments are the inputs and which returns the
    outputs (one tensor, or a tuple). hollow: returns the same on the meta device, without weights.
    integers: exclusive upper bounds of integer inputs. scale: a factor on the random values of an input, such as the
    range of timesteps. masks: inputs (rows, tokens) of ones, and then zeros. repeat: an input that is a vector over the
    batch and is to accept one value for all rows.
    facts: numbers that `load` writes into the graph beside the weights. per_prompt: inputs that a whole run shares.
    tied: axes that follow another: its name, and what it is multiplied with and then divided by, rounded up.
    products: axes that are the product of two others.
    more_sources: of other weights that are written into it.
    twin: makes the same with a few layers of the same weights, which is held against torch where the whole is too
    large to be. about_twin: what it is, in words.
    rewrites: the component whose graph this one's is made of, by `rewrite(graph, folder)`; "" for one that is traced.
    shares: the component whose weights this one has, too; "" where it shares none.
    """

    name: str
    source: str
    load: Callable[[], Any]
    hollow: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    axes: dict[str, Axis]
    integers: dict[str, int] = field(default_factory=dict)
    scale: dict[str, float] = field(default_factory=dict)
    masks: tuple[str, ...] = ()
    repeat: str = ""
    facts: tuple[float, ...] = ()
    per_prompt: tuple[str, ...] = ()
    tied: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    products: dict[str, tuple[str, str]] = field(default_factory=dict)
    more_sources: tuple[str, ...] = ()
    shares: str = ""
    rewrites: str = ""
    rewrite: Callable[[Path, Path], None] | None = None
    twin: Callable[[], ComponentSpec] | None = None
    about_twin: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """All that its weights come from."""
        return self.source, *self.more_sources

    def sizes(self, rng: np.random.Generator) -> dict[str, int]:
        """A random size for each axis."""
        return self.with_tied({name: axis.draw(rng) for name, axis in self.axes.items()})

    def smallest(self) -> dict[str, int]:
        """The least size of each axis."""
        return self.with_tied({name: axis.unit * -(-axis.low // axis.unit) for name, axis in self.axes.items()})

    def with_tied(self, sizes: dict[str, int]) -> dict[str, int]:
        """`sizes`, and those of the axes that follow them."""
        sizes = sizes | {name: -(-sizes[axis] * times // by) for name, (axis, times, by) in self.tied.items()}
        return sizes | {name: sizes[one] * sizes[other] for name, (one, other) in self.products.items()}

    def feeds(self, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, Array]:
        """Random inputs of these sizes."""
        result: dict[str, Array] = {}
        for tensor in self.inputs:
            shape = [sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape]
            if tensor.name in self.integers:
                result[tensor.name] = rng.integers(0, self.integers[tensor.name], shape).astype(tensor.dtype)
            elif tensor.name in self.masks:
                counts = rng.integers(1, shape[1] + 1, (shape[0], 1))
                result[tensor.name] = (np.arange(shape[1]) < counts).astype(tensor.dtype)
            elif tensor.name in self.scale:
                result[tensor.name] = (rng.random(shape) * self.scale[tensor.name]).astype(tensor.dtype)
            else:
                result[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
        return result
