"""Attentions in 8-bit floats: both products, and the weights between them.

GPUs run one as a single kernel where all that its products read is rounded right before them, after the scale and the
transpositions, and its weights by a fixed scale. With whole numbers of eight bits they do not, so that the scores
become a tensor: attentions stay out there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.fusion.attention import Attention as Found
from ...engines.fusion.attention import attentions_of as found_in
from ..graph import key
from .formats import Format, Scale

LEAST_KEYS = 32
"""With fewer, TensorRT does not make one kernel of an attention in 8-bit floats (1.7 for RTX, tried for sm89)."""
FIXED = "fixed"
"""The method of a scale that depends on no data."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The two products of an attention, which are in eight bits together.

    value: the name of what the second makes, by which it is known. made: of the same with its heads joined. products:
    what they are called, see `graph.key`. reads: the names of what they read: queries, keys, weights, values. sources:
    the projections that queries, keys and values are made of, and what each was multiplied with on the way. size: of a
    head.
    """

    value: str
    made: str
    products: tuple[str, str]
    reads: tuple[str, str, str, str]
    sources: tuple[tuple[str, float], tuple[str, float], tuple[str, float]]
    size: int

    @property
    def kinds(self) -> dict[str, str]:
        """The operators of its products by their names."""
        return dict.fromkeys(self.products, "MatMul")

    @property
    def keys(self) -> str:
        """The name of the keys."""
        return self.reads[1]

    def scales(self, largest: Mapping[str, float], form: Format) -> dict[str, Scale] | None:
        """Of what is read, None where nothing but zeros was seen. largest: max |x| of the projections."""
        query, key, value = (abs(factor) * largest[name] for name, factor in self.sources)
        if not min(query, key, value) > 0:
            return None
        # no weight is larger than 1
        limits = zip(self.reads, (query, key, 1.0, value), ("amax", "amax", FIXED, "amax"), strict=True)
        return {
            name: Scale(name, float(np.float32(amax / form.largest)), method, None) for name, amax, method in limits
        }


def attentions_of(model: Any) -> list[Attention]:
    """The attentions of an `onnx_ir` model that `graph.read` gave, in the order of its nodes; none that has a mask."""
    return [_of(each) for each in nodes_of(model).values()]


def nodes_of(model: Any) -> dict[str, Found]:
    """What the attentions of `attentions_of` are in the graph, by their values, in the order of the nodes."""
    return {str(each.product.outputs[0].name): each for each in found_in(model) if _is_plain(each)}


def _is_plain(found: Found) -> bool:
    """Whether nothing lies between its products and its softmax."""
    between = (found.scores.outputs[0], found.softmax.outputs[0])
    plain = between == (found.softmax.inputs[0], found.product.inputs[0])
    return plain and found.mask is None and not found.guarded and _width(found) > 0


def _of(found: Found) -> Attention:
    sources = (found.query, found.key, found.value)
    query, key_, value = ((str(each.value.name), each.scale) for each in sources)
    weights, values = (str(each.name) for each in found.product.inputs)
    queries, keys = (str(each.name) for each in found.scores.inputs)
    return Attention(
        str(found.product.outputs[0].name),
        str(found.output.outputs[0].name),
        (key(found.scores), key(found.product)),
        (queries, keys, weights, values),
        (query, key_, value),
        _width(found) // found.query.heads,
    )


def _width(found: Found) -> int:
    last = found.query.value.shape[-1]
    return last if isinstance(last, int) else 0
