"""The linear multistep method in sigma."""

from __future__ import annotations

import numpy as np
from numpy.polynomial.polynomial import polyfromroots, polyint

from ...common.arrays import Array
from .config import Config
from .euler import first_scale, sigma_builder
from .spacing import sigma_schedule, takes, training_sigmas
from .table import Steps, Table


def lms(config: Config, steps: Steps) -> Table:
    """Bashforth & Adams 1883 on uneven sigmas, as k-diffusion has it: the polynomial through the slopes, integrated.

    A run that starts later has no past slopes yet, and leaves their terms out of the higher order's sum.
    """
    takes(steps)
    config.lacks("rescale_betas_zero_snr")
    if config.get("use_karras_sigmas"):
        config.lacks("sigma_min", "sigma_max")
    config.one_of("prediction_type", "epsilon", "v_prediction", "sample")
    most = min(int(config.get("order", 4)), steps.count + 1)
    timesteps, sigmas = sigma_schedule(config, steps, training_sigmas(config))
    rows = sigma_builder(config, timesteps, sigmas[:-1], registers=most, start=steps.start)
    for k in rows.calls:
        slopes = [rows.to_d(k, sigmas[k]), *rows.registers[1:]]
        weights = integrals(sigmas[max(k + 1 - most, 0) : k + 1][::-1], sigmas[k + 1])[: k - steps.start + 1]
        rows.set(k, rows.x + sum(w * slope for w, slope in zip(weights, slopes, strict=False)), *slopes[: most - 1])
    return rows.table(first_scale(config, sigmas))


def integrals(nodes: Array, end: float) -> Array:
    """The integral from nodes[0] to `end` of each Lagrange polynomial of `nodes`."""
    start, length = nodes[0], end - nodes[0]
    scaled = (nodes - start) / length
    found = []
    for j, node in enumerate(scaled):
        others = np.delete(scaled, j)
        found.append(length * polyint(polyfromroots(others)).sum() / np.prod(node - others))
    return np.array(found)
