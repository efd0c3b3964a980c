"""What families share: CLIP text encoders, the conditional U-Net, autoencoders, as their configurations say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..bundle import Tensor
from ..bundle.wiring import PICTURE_SIDES, TASKS, Flow, Latents, TextEncoder, Wiring
from ..common.checks import is_finite
from ..common.errors import CheckpointError
from .family import Configs, Part, Pipeline

UNET = "UNet2DConditionModel"
TRANSFORMER = "transformer"
KL = "AutoencoderKL"
TINY = "AutoencoderTiny"
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast")
VAE = "vae"
VAE_TINY = "vae_tiny"
"""A second, small autoencoder, whose decoder is an alternative and a preview."""
_SCALING_FACTOR = 0.18215
_TILE_PIXELS = 512


def pipeline(
    configs: Configs,
    text: list[TextEncoder],
    latents: Latents,
    side: int,
    *,
    pooled: int = 0,
    scored: bool = False,
    **wiring: Any,
) -> Pipeline:
    """The pipeline of text encoders, a conditional U-Net and autoencoders.

    side: what is drawn by default, in latents. pooled: the width of the pooled embedding, 0 where the U-Net takes none.
    scored: whether it is given an aesthetic score. wiring: see `Wiring`.
    """
    inputs = _unet_inputs(configs.config("unet"), pooled)
    # a U-Net that sees the mask and the masked image beside the latents can only inpaint
    inpaints = inputs[0].shape[1] == 2 * latents.channels + 1
    tasks = tuple(TASKS)[1:] if scored else tuple(TASKS)  # what is given a score refines an image
    sources = {
        "sample": "latents.masked" if inpaints else "latents",
        "timestep": "timestep",
        "encoder_hidden_states": "text.hidden",
        "text_embeds": "text.pooled",
        "time_ids": "sizes.scored" if scored else "sizes",
        "timestep_cond": "guidance.sinusoid",
    }
    return Pipeline(
        tasks=("inpaint",) if inpaints else tasks,
        parts=_parts(configs, text, "unet"),
        wiring=Wiring(tuple(text), {tensor.name: sources[tensor.name] for tensor in inputs}, **wiring),
        latents=latents,
        inputs=inputs,
        width=side * latents.downscale,
        height=side * latents.downscale,
    )


def transformer_pipeline(
    configs: Configs,
    text: list[TextEncoder],
    latents: Latents,
    inputs: tuple[Tensor, ...],
    *,
    side: int,
    flow: Flow,
    steps: int | None = None,
    guidance: float | None = None,
    tasks: tuple[str, ...] = tuple(TASKS),
    latents_from: str = "latents",
    wrapper: str = "",
    **wiring: Any,
) -> Pipeline:
    """The pipeline of text encoders, a transformer that was trained by flow matching, and autoencoders.

    inputs: of the transformer, see `transformer_inputs`. side: what is drawn by default, in latents. steps, guidance:
    see `Pipeline`. latents_from: what feeds its `sample`, see `bundle.wiring.SOURCES`. wrapper: see `Part`. wiring: see
    `Wiring`.
    """
    sources = {tensor.name: _TRANSFORMER_SOURCES[tensor.name] for tensor in inputs} | {"sample": latents_from}
    return Pipeline(
        tasks=tasks,
        parts={**_parts(configs, text, TRANSFORMER), TRANSFORMER: Part("denoiser", TRANSFORMER, wrapper)},
        wiring=Wiring(tuple(text), sources, flow=flow, **wiring),
        latents=latents,
        inputs=inputs,
        width=side * latents.downscale,
        height=side * latents.downscale,
        steps=steps,
        guidance=guidance,
    )


def transformer_inputs(
    *,
    channels: int,
    text: int,
    pooled: int = 0,
    masked: bool = False,
    guided: bool = False,
    shown: bool = False,
    skipping: int = 0,
) -> tuple[Tensor, ...]:
    """The inputs of a transformer of these widths.

    pooled: 0 where it takes no pooled embedding. masked: whether it is told which hidden states are of the prompt,
    guided: and the guidance, shown: and a picture. skipping: how many layers it has that can be skipped.
    """
    inputs = [
        Tensor("sample", "float32", ("batch_size", channels, "height", "width")),
        Tensor("timestep", "float32", ("batch_size",)),
        Tensor("encoder_hidden_states", "float32", ("batch_size", "sequence_length", text)),
    ]
    if masked:
        inputs.append(Tensor("encoder_hidden_states_mask", "float32", ("batch_size", "sequence_length")))
    if pooled:
        inputs.append(Tensor("pooled_projections", "float32", ("batch_size", pooled)))
    if guided:
        inputs.append(Tensor("guidance", "float32", ("batch_size",)))
    if shown:
        inputs.append(Tensor("picture", "float32", ("batch_size", channels, *PICTURE_SIDES)))
    if skipping:
        inputs.append(Tensor("kept_layers", "float32", ("batch_size", skipping)))
    return tuple(inputs)


_TRANSFORMER_SOURCES = {
    "sample": "latents",
    "timestep": "timestep",
    "encoder_hidden_states": "text.hidden",
    "encoder_hidden_states_mask": "text.mask",
    "pooled_projections": "text.pooled",
    "guidance": "guidance",
    "picture": "picture",
    "kept_layers": "layers",
}


def _parts(configs: Configs, text: list[TextEncoder], denoiser: str) -> dict[str, Part]:
    return {
        **{encoder.component: Part("text", encoder.component) for encoder in text},
        **({"vae_tiny_decoder": Part("preview", VAE_TINY)} if configs.has(VAE_TINY) else {}),
        "vae_encoder": Part("encoder", VAE),
        "vae_decoder": Part("decoder", VAE),
        denoiser: Part("denoiser", denoiser),
    }


def before_last(
    configs: Configs, name: str, tokenizer: str, text: Literal[0, 1], *, pooled: bool = True
) -> TextEncoder:
    """A CLIP text encoder of which the input of the last layer is read. pooled: and the projected embedding."""
    last = int(configs.config(name)["num_hidden_layers"]) - 1
    return TextEncoder(
        name,
        tokenizer,
        text=text,
        hidden=f"hidden_states.{last}",
        skips=tuple(f"hidden_states.{i}" for i in reversed(range(last))),
        pooled="text_embeds" if pooled else "",
    )


def is_tiny(config: Mapping[str, Any]) -> bool:
    """Whether this is the configuration of an `AutoencoderTiny`."""
    return config.get("_class_name") == TINY


def downscale(config: Mapping[str, Any]) -> int:
    """Pixels a latent, along one side. Raises `CheckpointError` when the configuration names no blocks."""
    name = "decoder_block_out_channels" if is_tiny(config) else "block_out_channels"
    blocks = len(config[name])
    if not blocks:
        raise CheckpointError(f"the vae configuration has no {name}: download the checkpoint again")
    return int(2 ** (blocks - 1))


def latents_of(
    config: Mapping[str, Any], *, deviations: bool = False, shifted: bool = False, multiple: int = 1
) -> Latents:
    """How latents relate to the pixels of the autoencoder with this configuration.

    deviations: whether the pipeline classes read `latents_mean` and `latents_std`. shifted: whether they read
    `shift_factor`. multiple: what the denoiser takes, in latents a side.
    Raises `CheckpointError` when there is not one mean and deviation for each channel, or the factor is no number.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if not deviations or mean is None or std is None:
        mean = std = ()
    channels = int(config["latent_channels"])
    if not len(mean) == len(std) == (channels if mean else 0):
        raise CheckpointError(
            f"the vae configuration has {len(mean)} latents_mean and {len(std)} latents_std for {channels} latent "
            "channels: give one of each a channel, or leave both out"
        )
    factor = config.get("scaling_factor", 1.0 if is_tiny(config) else _SCALING_FACTOR)
    if not is_finite(factor) or not factor:
        raise CheckpointError(
            f"the scaling_factor in the vae's config.json must be a number other than 0, found {factor!r}: "
            "give that of the model (0.18215 for Stable Diffusion 1 and 2, 0.13025 for XL)"
        )
    shift = (config.get("shift_factor") or 0.0) if shifted else 0.0
    if not is_finite(shift):
        raise CheckpointError(
            f"the shift_factor in the vae's config.json must be a number, found {shift!r}: give that of the model"
        )
    down = downscale(config)
    side = config.get("sample_size")
    return Latents(
        channels=channels,
        downscale=down,
        scaling_factor=float(factor),
        tile=int(side) // down if isinstance(side, int) and side >= down else _TILE_PIXELS // down,
        mean=tuple(float(value) for value in mean),
        std=tuple(float(value) for value in std),
        encoded="sample" if is_tiny(config) else "parameters",
        inpaint_by_factor=bool(mean),
        shift_factor=float(shift),
        multiple=multiple,
    )


def _unet_inputs(unet: Mapping[str, Any], pooled: int) -> tuple[Tensor, ...]:
    inputs = [
        Tensor("sample", "float32", ("batch_size", int(unet["in_channels"]), "height", "width")),
        Tensor("timestep", "float32", ("batch_size",)),
        Tensor("encoder_hidden_states", "float32", ("batch_size", "sequence_length", unet["cross_attention_dim"])),
    ]
    if pooled:
        inputs.append(Tensor("text_embeds", "float32", ("batch_size", pooled)))
        inputs.append(Tensor("time_ids", "float32", ("batch_size", _time_ids(unet, pooled))))
    if unet.get("time_cond_proj_dim") is not None:
        inputs.append(Tensor("timestep_cond", "float32", ("batch_size", int(unet["time_cond_proj_dim"]))))
    return tuple(inputs)


def side_of(unet: Mapping[str, Any]) -> int:
    """`sample_size` of a U-Net's configuration, in latents. Raises `CheckpointError` where there is none."""
    side = unet.get("sample_size")
    if not isinstance(side, int) or isinstance(side, bool):
        raise CheckpointError("the U-Net configuration has no integer sample_size: add it to unet/config.json")
    return side


def _time_ids(unet: Mapping[str, Any], pooled: int) -> int:
    """How many numbers say the sizes of the picture: 6, or 5 with an aesthetic score."""
    count = (int(unet["projection_class_embeddings_input_dim"]) - pooled) / int(unet["addition_time_embed_dim"])
    if count not in (5, 6):
        raise CheckpointError(
            f"the U-Net takes {unet['projection_class_embeddings_input_dim']} added numbers "
            f"(projection_class_embeddings_input_dim), the text encoder gives {pooled} pooled ones, which leaves "
            f"{count:g} sizes of the picture where 5 or 6 are supported: give parts of one checkpoint "
            "(--component text_encoder_2=FOLDER or --component unet=FOLDER)"
        )
    return int(count)
