"""SmoothQuant (Xiao et al. 2022): what a few channels of a value have too much is moved into the weights that read it.

A value is multiplied with a factor for each channel before it is rounded, and the rows of the matrices are divided by
them, which changes nothing but what rounding loses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ...common.arrays import Array
from ...engines.fusion.graph import map_tensor, weight_of
from ..graph import key, read, read_blocked
from ..sessions import start
from .formats import Format, Scale
from .layers import Group, Layer, along, bias_of, scales_of
from .probes import Probes
from .statistics import Statistics
from .write import copied, over

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_LEAST_GAIN_DB = 0.5
"""What smoothing must gain: a multiplication more is not free everywhere."""
_ROWS = 64
"""Rows of a value that are looked at in a call."""
_SMALLEST = 1e-5
"""Of the largest factor's inverse: a channel that is nearly silent gets no enormous factor."""


def smooth(
    source: Path,
    component: str,
    form: Format,
    groups: Sequence[Group],
    scales: Mapping[str, Scale],
    statistics: Statistics,
    calls: Sequence[Mapping[str, Array]],
    told: Callable[[int, int], None],
) -> dict[str, Scale]:
    """`scales`, with factors where they let the layers of a linear group lose less in the worst of `calls`."""
    linear = [group for group in groups if group.is_linear and group.value in scales]
    seen = rows(source, component, linear, calls)
    weights = weights_of(source, linear)
    found = dict(scales)
    for i, group in enumerate(linear):
        matrices = [outputs_last(weights[layer.weight](), layer) for layer in group.layers]
        plain = scales[group.value]
        best, lost = plain, _loss(form, plain, matrices, seen[group.value])
        for alpha in ALPHAS:
            made = smoothed(plain, form, alpha, statistics.peaks[group.value], matrices)
            each = _loss(form, made, matrices, seen[group.value])
            if each < lost * 10 ** (-_LEAST_GAIN_DB / 10 if best is plain else 0):
                best, lost = made, each
        if best is not plain:
            found[group.value] = replace(best, loss_db=round(float(-10 * np.log10(max(lost, 1e-20))), 2))
        told(i + 1, len(linear))
    return found


def smoothed(scale: Scale, form: Format, alpha: float, peaks: Array, matrices: Sequence[Array]) -> Scale:
    """`scale` with the factors of this α. peaks: of the value's channels. matrices: (channels, outputs) each."""
    factors = factors_of(alpha, peaks, np.max([np.abs(each).max(axis=1) for each in matrices], axis=0))
    largest = float(np.float32((peaks * factors).max() / form.largest))
    return replace(scale, scale=largest, method=f"smooth {alpha:g}", factors=factors)


def factors_of(alpha: float, peaks: Array, weights: Array) -> Array:
    """What channels are multiplied with, float32: peaks^-α · weights^(1-α), of a geometric mean of one.

    peaks, weights: the largest magnitudes of each channel in the value, and in the rows of the matrices.
    """
    there = (peaks > 0) & (weights > 0)
    if not there.any():
        return np.ones(len(peaks), np.float32)
    logs = (1 - alpha) * np.log(np.maximum(weights, 1e-30)) - alpha * np.log(np.maximum(peaks, 1e-30))
    logs = np.where(there, logs, logs[there].mean())
    logs = np.minimum(logs - logs.mean(), -np.log(_SMALLEST))
    return np.asarray(np.exp(logs), np.float32)


def rows(
    source: Path, component: str, groups: Sequence[Group], calls: Sequence[Mapping[str, Array]]
) -> dict[str, list[Array]]:
    """Some rows of each linear group's value in each call, float32 (rows, channels)."""
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = read_blocked(source)
    probes = Probes(model.graph)
    for group in groups:
        value = probes.values[group.value]
        matrix = [-1, group.layers[0].shape[1 - group.layers[0].axis]]
        probes.give(
            f"{group.value}:rows",
            value.producer(),
            partial(probes.sample, value, matrix, _ROWS),
            onnx_ir.DataType.FLOAT,
            [None, matrix[1]],
        )
    model.graph.outputs[:] = probes.given
    RemoveUnusedNodesPass()(model)
    found: dict[str, list[Array]] = {group.value: [] for group in groups}
    if groups:
        engine = start(model, source.parent, component, fast=False)
        given = {tensor.name for tensor in engine.inputs}
        for feeds in calls:
            made = engine({name: each for name, each in feeds.items() if name in given})
            for group in groups:
                found[group.value].append(made[f"{group.value}:rows"])
    return found


def weights_of(source: Path, groups: Sequence[Group]) -> dict[str, Callable[[], Array]]:
    """What reads the weight of each layer of `groups`, float32, by its name."""
    nodes = {key(node): node for node in read(source).graph}
    found: dict[str, Callable[[], Array]] = {}
    for group in groups:
        for layer in group.layers:
            tensor = weight_of(nodes[layer.name].inputs[1]).const_value
            found[layer.weight] = partial(map_tensor, tensor, copied)
    return found


def shifts(
    source: Path, form: Format, groups: Sequence[Group], scales: Mapping[str, Scale], statistics: Statistics
) -> dict[str, Array]:
    """What puts the mean of each channel that a layer makes back where it was, float32 (channels,), by layer.

    It is the error of the weights times the mean of the value (Nagel et al. 2019, "bias correction").
    """
    nodes = {key(node): node for node in read(source).graph}
    weights = weights_of(source, groups)
    found = {}
    for group in groups:
        scale, mean = scales[group.value], statistics.means[group.value]
        for layer in group.layers:
            channels = layer.shape[1 if layer.kind == "Conv" else 1 - layer.axis]
            if bias_of(nodes[layer.name]) is None or channels != len(mean):
                continue
            weight = over(weights[layer.weight](), scale.factors, layer.axis)
            steps = along(scales_of(weight, layer.axis, form.largest), layer.axis, weight.ndim)
            error = outputs_last(weight - form.rounded(weight, steps), layer)
            seen = mean if scale.factors is None else mean * scale.factors
            found[layer.name] = np.asarray(seen.astype(np.float64) @ error, np.float32)
    return found


def outputs_last(weight: Array, layer: Layer) -> Array:
    """A weight as a matrix (channels of the input, channels of the output); the pixels of a kernel are added up."""
    if layer.kind == "Conv":
        return np.asarray(weight.sum(axis=tuple(range(2, weight.ndim))).T)
    return weight if layer.axis == 1 else weight.T


def _loss(form: Format, scale: Scale, matrices: Sequence[Array], seen: Sequence[Array]) -> float:
    """Noise over signal of the products of `seen` with `matrices`, their mean, in the worst of `seen`."""
    lost = np.zeros(len(seen))
    for matrix in matrices:
        weight = matrix if scale.factors is None else matrix / scale.factors[:, None]
        weight = form.rounded(weight, scales_of(weight, 1, form.largest)[None])
        for i, each in enumerate(seen):
            exact = each @ matrix
            value = form.rounded(each if scale.factors is None else each * scale.factors, scale.scale)
            signal = float(np.sum(np.square(exact, dtype=np.float64)))
            noise = float(np.sum(np.square(value @ weight - exact, dtype=np.float64)))
            lost[i] += noise / signal if signal > 0 else 0.0
    return float(lost.max() / len(matrices))
