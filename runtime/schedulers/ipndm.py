"""iPNDM."""

from __future__ import annotations

import numpy as np

from ...common.errors import RequestError
from .config import Config, linspace32
from .spacing import as_float32, count_of, takes
from .table import Rows, Steps, Table

_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
_SMALLEST_ALPHA = 1e-8


def ipndm(config: Config, steps: Steps) -> Table:
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", F-PNDM without its first steps.

    The model predicts v of x = α · image + β · noise; timesteps are angles between 1 and 0.
    """
    takes(steps)
    count = count_of(config, steps)
    if steps.start:
        raise RequestError("ipndm cannot start from an image: choose another --scheduler")
    if config.get("trained_betas") is not None:
        beta = as_float32(config.get("trained_betas"))
    else:
        angle = np.append(linspace32(1, 0, count + 1)[:-1], np.float32(0)) * np.float32(np.pi) / np.float32(2)
        beta = np.sin(angle.astype(np.float64)).astype(np.float32) ** 2
    beta = np.asarray(beta, np.float32)
    alpha = np.sqrt(1 - beta**2)
    timesteps = np.arctan2(beta, alpha).astype(np.float64)[:-1] / np.pi * 2
    alpha, beta = alpha.astype(np.float64), beta.astype(np.float64)
    rows = Rows(timesteps, np.stack([alpha, beta], axis=1)[:-1], len(_BASHFORTH))
    for k in range(len(timesteps)):
        slopes = [beta[k] * rows.x + alpha[k] * rows.m, *rows.kept[1:]]
        weights = _BASHFORTH[min(k, 3)]
        slope = sum(w * past for w, past in zip(weights, slopes, strict=False))
        x0 = (rows.x - beta[k] * slope) / max(alpha[k], _SMALLEST_ALPHA)
        rows.set(k, alpha[k + 1] * x0 + beta[k + 1] * slope, *slopes[:3])
    return rows.table()
