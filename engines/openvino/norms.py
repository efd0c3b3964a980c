"""Group norms written so that OpenVINO's processor plugin can run them in the layout of the convolutions around them.

ONNX has a group norm as a reshape, an instance norm and a reshape back. The reshapes need channels first, convolutions
run with channels last, and the plugin copies each image from one to the other on the way, by a kernel that is slow on
single precision: half of the time of a small decoder, 5 % of that of Stable Diffusion. Means over the pixels of each
channel, put together by groups, need no reshape of the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .device import module

_READ_SIZES = "ShapeOf"


def without_reshapes(model: Any) -> Any:
    """`model` with its group norms as means and variances of channels, put together by groups: the same numbers.

    The variance is of differences to the mean, never a difference of squares. What is not such a norm is left alone.
    """
    for node in list(model.get_ordered_ops()):
        if node.get_type_name() == "MVN":
            found = _Norm.of(node)
            if found is not None:
                found.rewrite()
    model.validate_nodes_and_infer_types()
    return model


class _Norm:
    """A group norm: the value `x` (N, C, …) that it reads, and the node `end` that gives its result."""

    def __init__(self, x: Any, end: Any, groups: int, gamma: Any, beta: Any, eps: float) -> None:
        self._x, self._end, self._groups, self._gamma, self._beta, self._eps = x, end, groups, gamma, beta, eps

    @classmethod
    def of(cls, mvn: Any) -> _Norm | None:
        """The norm around `mvn`, as the reader of ONNX writes it; None where it is none, or of another kind."""
        before, axes = _source(mvn, 0), _constant(_source(mvn, 1))
        sizes = _constant(_source(before, 1)) if before.get_type_name() == "Reshape" else None
        of_groups = sizes is not None and len(sizes) == 3 and sizes[0] == 0 and sizes[1] > 0 and sizes[2] == -1
        inside = mvn.get_attributes()
        if not (of_groups and axes is not None and axes.tolist() == [2]) or inside["eps_mode"] != "INSIDE_SQRT":
            return None
        assert sizes is not None
        # the instance norm's own scale and bias, which do nothing
        scaled = _next(mvn, "Multiply")
        shifted = _next(scaled, "Add")
        back = _next(shifted, "Reshape")
        product = _next(back, "Multiply")
        end = _next(product, "Add")
        if end is None or not (_is(_beside(scaled, mvn), 1.0) and _is(_beside(shifted, scaled), 0.0)):
            return None
        x = before.input(0).get_source_output()
        rank = x.get_partial_shape().rank
        if rank.is_dynamic or not inside["normalize_variance"]:
            return None
        gamma, beta = (
            _per_channel(each, rank.get_length()) for each in (_beside(product, back), _beside(end, product))
        )
        if gamma is None or beta is None or gamma.size != beta.size or gamma.size % int(sizes[1]):
            return None
        return cls(x, end, int(sizes[1]), gamma, beta, float(inside["eps"]))

    def rewrite(self) -> None:
        """Put the means in its place."""
        op = module().opset13
        x, channels, groups = self._x, self._gamma.size, self._groups
        rank = x.get_partial_shape().rank.get_length()
        pixels, in_group = _integers(range(2, rank)), _integers([2])
        by_group, by_channel = (
            _integers([0, groups, channels // groups, 1]),
            _integers([0, channels, *[1] * (rank - 2)]),
        )

        def constant(array: Any) -> Any:
            return op.constant(np.asarray(array, np.float32).reshape(1, groups, -1, 1))

        mean_each = op.reduce_mean(x, pixels, True)
        away = op.subtract(x, mean_each)
        variance_each = op.reshape(op.reduce_mean(op.multiply(away, away), pixels, True), by_group, True)
        mean_each = op.reshape(mean_each, by_group, True)
        mean = op.reduce_mean(mean_each, in_group, True)
        apart = op.subtract(mean_each, mean)
        variance = op.reduce_mean(op.add(variance_each, op.multiply(apart, apart)), in_group, True)
        scale = op.divide(constant(self._gamma), op.sqrt(op.add(variance, op.constant(np.float32(self._eps)))))
        shift = op.subtract(constant(self._beta), op.multiply(mean, scale))
        made = op.add(op.multiply(x, op.reshape(scale, by_channel, True)), op.reshape(shift, by_channel, True))
        made.set_friendly_name(self._end.get_friendly_name())
        for reader in self._end.output(0).get_target_inputs():
            reader.replace_source_output(made.output(0))


def _source(node: Any, index: int) -> Any:
    return node.input(index).get_source_output().get_node()


def _next(node: Any | None, kind: str) -> Any | None:
    """The one node that reads the values of `node`, where it is of this kind."""
    if node is None:
        return None
    readers = [each.get_node() for each in node.output(0).get_target_inputs()]
    readers = [each for each in readers if each.get_type_name() != _READ_SIZES]
    return readers[0] if len(readers) == 1 and readers[0].get_type_name() == kind else None


def _beside(node: Any, other: Any) -> Any | None:
    """What is multiplied with or added to the value of `other` in `node`, as an array; None where it is no constant."""
    both = [_source(node, i) for i in (0, 1)]
    beside = [each for each in both if each.get_friendly_name() != other.get_friendly_name()]
    if len(beside) != 1:
        return None
    if beside[0].get_type_name() == "Reshape":  # of a constant, to sizes that the reader of ONNX works out
        return _constant(_source(beside[0], 0))
    return _constant(beside[0])


def _per_channel(array: Any | None, rank: int) -> Any | None:
    """`array` as a vector, when it spans the channels of a value (N, C, …) of this rank and nothing else."""
    wide = array is not None and array.ndim >= rank - 1 and array.shape[1 - rank] == array.size
    return array.reshape(-1) if array is not None and wide else None


def _constant(node: Any) -> Any | None:
    return np.asarray(node.data) if node.get_type_name() == "Constant" else None


def _is(array: Any | None, value: float) -> bool:
    return array is not None and bool((array == value).all())


def _integers(values: Any) -> Any:
    return module().opset13.constant(np.array(list(values), np.int64))
