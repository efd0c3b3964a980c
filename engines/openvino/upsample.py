"""Nearest-neighbour upsampling and the 3×3 convolution after it as one transposed convolution: 4 products for 9.

After upsampling by two, the nine pixels under a kernel are copies of four. Adding up the weights of the copies first
gives a kernel of 4×4 with stride 2. The numbers are the same but for the rounding of those sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...common.arrays import Array
from .device import module

_OF_TAPS = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], np.float32)
"""What each of the four taps of an axis is the sum of."""
_KERNEL, _BY_TWO = [3, 3], [2, 2]


def in_one_convolution(model: Any) -> Any:
    """`model` with every upsampling by two of images (N, C, h, w) merged into the convolution that reads it.

    One whose factor is not known before the sizes of the inputs are is left alone.
    """
    for node in list(model.get_ordered_ops()):
        if node.get_type_name() == "Convolution":
            _rewrite(node)
    model.validate_nodes_and_infer_types()
    return model


def _rewrite(convolution: Any) -> None:
    before = convolution.input(0).get_source_output().get_node()
    weights = convolution.input(1).get_source_output().get_node()
    if before.get_type_name() != "Interpolate" or weights.get_type_name() != "Constant":
        return
    if not (_is_plain(convolution, weights) and _is_nearest(before) and _factors(before) == _BY_TWO):
        return
    op = module().opset13
    taps = op.constant(merged(weights.data), shared_memory=True)
    made = op.convolution_backprop_data(
        before.input(0).get_source_output(), taps, _BY_TWO, None, [1, 1], [1, 1], [1, 1]
    )
    made.set_friendly_name(convolution.get_friendly_name())
    for reader in convolution.output(0).get_target_inputs():
        reader.replace_source_output(made.output(0))


def merged(weights: Array) -> Array:
    """The kernel (I, O, 4, 4) of the transposed convolution, from that of the convolution, (O, I, 3, 3)."""
    outputs, inputs = weights.shape[:2]
    sums = weights.reshape(-1, 9) @ np.kron(_OF_TAPS, _OF_TAPS).T.astype(weights.dtype)
    return np.ascontiguousarray(sums.reshape(outputs, inputs, 16).swapaxes(0, 1)).reshape(inputs, outputs, 4, 4)


def _is_plain(convolution: Any, weights: Any) -> bool:
    """Whether it has a kernel of 3×3, stride 1 and a border of one zero."""
    found = convolution.get_attributes()
    ones = all(list(found[name]) == [1, 1] for name in ("strides", "dilations", "pads_begin", "pads_end"))
    return ones and found["auto_pad"] == "explicit" and list(weights.data.shape[2:]) == _KERNEL


def _is_nearest(upsampling: Any) -> bool:
    found = upsampling.get_attributes()
    kind = found["mode"], found["coordinate_transformation_mode"], found["nearest_mode"]
    pads = [*found["pads_begin"], *found["pads_end"]]
    alone = len(upsampling.output(0).get_target_inputs()) == 1
    return kind == ("nearest", "asymmetric", "floor") and not any(pads) and not found["antialias"] and alone


def _factors(upsampling: Any) -> list[float] | None:
    """By what it makes an image (N, C, h, w) larger, None where that is not known or is not all that it does."""
    scales = upsampling.input(1).get_source_output().get_node()
    if upsampling.get_attributes()["shape_calculation_mode"] == "scales":
        known = scales.get_type_name() == "Constant" and len(upsampling.inputs()) == 2
        factors = [float(each) for each in scales.data] if known else []
    else:
        small, large = upsampling.input(0).get_partial_shape(), upsampling.output(0).get_partial_shape()
        if small.is_dynamic or large.is_dynamic:
            return None
        factors = [high / low for low, high in zip(small.to_shape(), large.to_shape(), strict=True)]
    return factors[2:] if len(factors) == 4 and factors[:2] == [1, 1] else None
