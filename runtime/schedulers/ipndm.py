"""iPNDM."""

from __future__ import annotations

import numpy as np

from ...common.errors import RequestError
from .config import Config, linspace32
from .pndm import ADAMS_BASHFORTH
from .spacing import as_float32, count_of, takes
from .table import Steps, Table, TableBuilder

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
    rows = TableBuilder(timesteps, alpha[:-1], beta[:-1], registers=len(ADAMS_BASHFORTH))
    for k in rows.calls:
        slopes = [beta[k] * rows.x + alpha[k] * rows.m, *rows.registers[1:]]
        slope = sum(w * past for w, past in zip(ADAMS_BASHFORTH[min(k, 3)], slopes, strict=False))
        x0 = (rows.x - beta[k] * slope) / max(alpha[k], _SMALLEST_ALPHA)
        rows.set(k, alpha[k + 1] * x0 + beta[k + 1] * slope, *slopes[:3])
    return rows.table()
