"""What the configurations already show: whether the models can be built and run, and whether they fit each other.

All of it is found without weights, before any work is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..bundle import Tensor
from ..bundle.wiring import plain
from ..common.errors import CheckpointError, reason
from ..families import Pipeline
from ..families.parts import TRANSFORMER
from .graphs.spec import ComponentSpec
from .guard import guarded
from .loading import quiet

UNET = "unet"
_KINDS = {UNET: ("U-Net", " (cross_attention_dim)"), TRANSFORMER: ("transformer", "")}
"""What a denoiser is called, and the option that says how wide its text is, where that is one for all of the kind."""
_WRONG = "which is damaged or not supported (give the one that the part was saved with)"
_ODD = (5, 7)
"""Sides, in units, that no power of two divides."""


def hollow(kind: Any, config: Any) -> Any:
    """A model of the class `kind` on the meta device, without weights.

    config: a transformers configuration, or the JSON object of a diffusers one.
    """
    import torch

    with torch.device("meta"), quiet():
        return (kind.from_config(config) if isinstance(config, Mapping) else kind(config)).eval()


def multiple_of(module: Any, inputs: Sequence[Tensor], largest: int) -> int:
    """What the sides of the first of `inputs` must be multiples of, a power of two up to `largest`.

    module: on the meta device; its output has the sides of the input.
    Raises `CheckpointError` when the model takes no such sides.
    """
    unit, refusal = 1, ""
    while unit <= largest:
        sides = {"height": _ODD[0] * unit, "width": _ODD[1] * unit}
        try:
            made = _run(module, inputs, {"batch_size": 2, "sequence_length": 8, **sides})[0]
            if tuple(made.shape[2:]) == tuple(sides.values()):
                return unit
        except Exception as error:  # whatever the model's code raises for sides that it does not take
            refusal = reason(error)
        unit *= 2
    raise CheckpointError(f"a U-Net of this configuration cannot be run ({refusal}): it is damaged, or not supported")


def _run(module: Any, inputs: Sequence[Tensor], sizes: Mapping[str, int]) -> tuple[Any, ...]:
    import torch

    feeds = {}
    for each in inputs:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in each.shape]
        feeds[each.name] = torch.empty(shape, device="meta", dtype=getattr(torch, each.dtype))
    with torch.no_grad(), quiet():
        result = module(**feeds)
    return result if isinstance(result, tuple) else (result,)


def check_models(specs: Sequence[ComponentSpec]) -> None:
    """Build and run each model without weights. Raises `CheckpointError` for what its class or its code refuses."""
    for spec in specs:
        with guarded(f"the {spec.name} cannot be built from the {spec.source} configuration, {_WRONG}"):
            module = spec.hollow()
        with guarded(f"the {spec.name} cannot be run as the {spec.source} configuration describes it, {_WRONG}"):
            made = _run(module, spec.inputs, spec.smallest())
        for tensor, value in zip(spec.outputs, made, strict=False):
            fixed = {i: size for i, size in enumerate(tensor.shape) if isinstance(size, int)}
            if len(made) != len(spec.outputs) or any(value.shape[i] != size for i, size in fixed.items()):
                raise CheckpointError(
                    f"the {spec.name} gives {len(made)} outputs, {tensor.name} of shape {tuple(value.shape)}, where "
                    f"its configuration tells {len(spec.outputs)} and {tensor.shape}: the configuration is damaged, or "
                    "not supported; give the one that the part was saved with"
                )


def check_parts(specs: Sequence[ComponentSpec], pipeline: Pipeline) -> None:
    """Hold text encoders and autoencoder against the denoiser. Raises `CheckpointError` naming both and a remedy."""
    by_name = {spec.name: spec for spec in specs}
    denoiser = next(by_name[name] for name, part in pipeline.parts.items() if part.role == "denoiser")
    kind, option = _KINDS.get(denoiser.source, _KINDS[UNET])
    latents, sources = pipeline.latents, pipeline.wiring.inputs
    taken = {plain(sources[tensor.name]): tensor.shape for tensor in denoiser.inputs}
    widths: dict[str, list[int]] = {"width": [], "sequence": []}
    for each in pipeline.wiring.text:
        if each.hidden:
            widths[each.join].append(_width(by_name[each.component], each.hidden))
    wide, text = max([sum(widths["width"]), *widths["sequence"]]), [each.component for each in pipeline.wiring.text]
    read = int(taken["text.hidden"][2])
    if wide > read or (wide < read and not pipeline.wiring.zeros):  # before zeros what is narrow is filled up
        shown = [(n, _width(by_name[n], e.hidden)) for n, e in zip(text, pipeline.wiring.text, strict=True) if e.hidden]
        gives = " and ".join(f"{name} gives {width}" for name, width in shown)
        raise CheckpointError(
            f"{gives} numbers a token, the {kind} takes {taken['text.hidden'][2]}{option}: they "
            f"are not of one checkpoint; give parts that belong together ({_remedy((*text, denoiser.source))})"
        )
    pooled = sum(_width(by_name[e.component], e.pooled, 1) for e in pipeline.wiring.text if e.pooled)
    if "text.pooled" in taken and pooled != taken["text.pooled"][1]:
        raise CheckpointError(
            f"the text encoders give {pooled} pooled numbers, the {kind} takes {taken['text.pooled'][1]}: they are "
            f"not of one checkpoint; give parts that belong together ({_remedy((*text, denoiser.source))})"
        )
    made, channels = denoiser.outputs[0].shape[1], taken["latents"][1]
    own = latents.channels
    known = (own, 2 * own + 1) if denoiser.source == UNET else (own, 2 * own, 2 * own + latents.downscale**2)
    if made != own or channels not in known:
        raise CheckpointError(
            f"the autoencoder has {latents.channels} latent channels, the {kind} takes {channels} and gives {made}: "
            f"they are not of one checkpoint; give parts that belong together ({_remedy(('vae', denoiser.source))})"
        )


def _width(spec: ComponentSpec, output: str, axis: int = 2) -> int:
    return next(int(tensor.shape[axis]) for tensor in spec.outputs if tensor.name == output)


def _remedy(names: Sequence[str]) -> str:
    return " or ".join(f"--component {name}=FOLDER" for name in names)
