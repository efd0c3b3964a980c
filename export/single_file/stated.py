"""What a single file says of itself beside its weights: in its metadata, or by the name of an empty tensor.

The spellings are those of Stability AI's modelspec, kohya's sd-scripts (ss_*) and ComfyUI. What is said and not
understood, or said in two ways, is an error: the file is then not what it is taken for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...common.errors import CheckpointError
from .layouts import REFINER, SD1, SD2, SDXL, Layout
from .weights import Weights

_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v_pred", "vpred", "velocity"), "v_prediction"),
    **dict.fromkeys(("v_parameterization", "v_parametrization"), "v_prediction"),
    **dict.fromkeys(("sample", "x0", "x_0", "x_start"), "sample"),
}
_NAMED = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type")
_FLAGS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_V_PREDICTION = ("ss_v_parameterization", "v_pred")
_ZERO_SNR = ("ss_zero_terminal_snr", "ztsnr")
_UNSAID = ("", "none", "null")
_ARCHITECTURE = "modelspec.architecture"
_ARCHITECTURES: tuple[tuple[str, Layout | None], ...] = (
    ("stable-diffusion-v1", SD1),
    ("stable-diffusion-v2", SD2),
    ("stable-diffusion-xl-v1-refiner", REFINER),
    ("stable-diffusion-xl", SDXL),
    ("stable-diffusion-v3", None),
    ("stable-diffusion-3", None),
    ("stable-video-diffusion", None),
    ("stable-cascade", None),
    ("flux", None),
)
"""How the names of architectures begin, and the layout: None for one that is not supported. Other names are free."""
_SAY = "say it with --prediction-type (epsilon, v_prediction or sample)"
_BY_CONFIG = "give the diffusers folder of a checkpoint of the same make as the configuration (--config)"


def prediction_type(weights: Weights, layout: Layout) -> str | None:
    """What the U-Net predicts, as diffusers spells it; None where the file says nothing of it.

    Beside the metadata, an empty tensor `v_pred` says it, and the architecture of Stable Diffusion 2.
    Raises `CheckpointError` for what is not understood or contradicts itself.
    """
    process = _value(weights, "modelspec.noise_process")
    if process not in ("", "ddpm"):
        raise CheckpointError(
            f"{weights.path} says that it was trained for the process {process!r} (modelspec.noise_process), "
            f"{layout.title} by ddpm: where it is drawn by ddpm, {_SAY}"
        )
    said = _said(weights, _NAMED, _PREDICTIONS, "says that it predicts {value!r} ({key}), unknown here", _SAY)
    flags = _flags(weights, _V_PREDICTION, _SAY)
    said |= {key: "v_prediction" if flag else "epsilon" for key, flag in flags.items()}
    architecture = _value(weights, _ARCHITECTURE)
    if layout is SD2 and architecture.startswith(("stable_diffusion_v2_512", "stable_diffusion_v2_768_v")):
        said[_ARCHITECTURE] = "epsilon" if "_512" in architecture else "v_prediction"
    if len(set(said.values())) > 1:
        raise CheckpointError(
            f"{weights.path} contradicts itself: it predicts "
            f"{' and '.join(f'{value} by {key}' for key, value in said.items())}: {_SAY}"
        )
    return next(iter(said.values()), None)


def zero_snr(weights: Weights) -> bool:
    """Whether it was trained with a last step of pure noise (Lin et al. 2023). Raises `CheckpointError`."""
    flags = _flags(weights, _ZERO_SNR, _BY_CONFIG)
    if len(set(flags.values())) > 1:
        raise CheckpointError(f"{weights.path} contradicts itself in {' and '.join(flags)}: {_BY_CONFIG}")
    return any(flags.values())


def check_architecture(weights: Weights, layout: Layout) -> None:
    """Raise `CheckpointError` where it says that it is of another layout than its tensors are."""
    stated = weights.metadata.get(_ARCHITECTURE, "").strip()
    for start, other in _ARCHITECTURES:
        if stated.lower().startswith(start):
            if other is not layout:
                raise CheckpointError(
                    f"{weights.path} says that it is {stated!r} ({_ARCHITECTURE}), its tensors are those of "
                    f"{layout.title}: where they are right, {_BY_CONFIG}"
                )
            return


def _value(weights: Weights, key: str) -> str:
    value = weights.metadata.get(key, "").strip().lower().replace("-", "_").replace(" ", "_")
    return "" if value in _UNSAID else value


def _said(
    weights: Weights, keys: Iterable[str], meanings: Mapping[str, Any], problem: str, remedy: str
) -> dict[str, Any]:
    """What the metadata of these keys mean. problem: of a value without a meaning."""
    values = {key: value for key in keys if (value := _value(weights, key))}
    for key, value in values.items():
        if value not in meanings:
            found = problem.format(key=key, value=weights.metadata[key])
            raise CheckpointError(f"{weights.path} {found}: {remedy}")
    return {key: meanings[value] for key, value in values.items()}


def _flags(weights: Weights, keys: tuple[str, str], remedy: str) -> dict[str, bool]:
    """What the metadata of these keys say, true or false, and an empty tensor of the name of the last one."""
    flags = _said(weights, keys, _FLAGS, "says {value!r} of {key}, neither true nor false", remedy)
    return flags | ({f"the tensor {keys[-1]}": True} if keys[-1] in weights.shapes else {})
