"""ControlNets of transformers, and the transformer that takes their residuals and the tokens of pictures."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import diffusers
import torch

from ...bundle import Tensor
from ...bundle.wiring import MODE, PICTURE, SCALE, STRENGTH
from ...families import Pipeline
from ...families.control import MOST_SLOTS, PICTURES, PREFIX, side, slot, tokens
from ...families.parts import TRANSFORMER
from ...families.transformer_control import CONTROLNETS, FLUX, SD3, Layout, layout, residuals
from ..checkpoint import Checkpoint
from ..configs import control_config, transformer_config
from ..fit import hollow
from ..graphs.spec import Axis, ComponentSpec, argument
from ..loading import load_mapped
from .transformer import TIMESTEPS, Frequencies, Rotations, packed, positions, text_positions, transformer
from .transformer_tokens import Tokens, given_tokens, read_tokens

_GUIDANCE = 7.0
"""What a ControlNet is given beside a transformer that is given no guidance; the default of diffusers' pipelines."""


class StableDiffusion3Control(torch.nn.Module):
    """The residuals of an `SD3ControlNetModel` that some block reads, each times its scale.

    Where it is given no pooled text, that is zeros.
    """

    def __init__(self, model: Any, made: Layout) -> None:
        super().__init__()
        self.model, self.read = model, made.numbers()[0]
        model.time_text_embed.time_proj = Frequencies(model.time_text_embed.time_proj)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        controlnet_cond: torch.Tensor,
        scale: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if pooled_projections is None:
            pooled_projections = sample.new_zeros(sample.shape[0], self.model.config.pooled_projection_dim)
        made = self.model(
            sample,
            controlnet_cond,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            return_dict=False,
        )[0]
        return _scaled([made[i] for i in self.read], scale)


class FluxControl(torch.nn.Module):
    """The residuals of a `FluxControlNetModel` that some block reads, each times its scale.

    Of one that reads pictures of several modes, the sum over the pictures, which are rows of one call.
    """

    def __init__(self, model: Any, made: Layout) -> None:
        super().__init__()
        self.model, self.read = model, made.numbers()
        model.time_text_embed.time_proj = Frequencies(model.time_text_embed.time_proj)
        model.pos_embed = Rotations(model.pos_embed)
        if model.union:
            modes = model.controlnet_mode_embedder
            modes.forward = lambda one_hot: one_hot @ modes.weight

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt_hidden_states: torch.Tensor,
        prompt_pooled_projections: torch.Tensor,
        controlnet_cond: torch.Tensor,
        scale: torch.Tensor,
        guidance: torch.Tensor | None = None,
        control_type: torch.Tensor | None = None,
        strength: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        rows, pictures = sample.shape[0], 1 if strength is None else strength.shape[1]
        if guidance is None and self.model.config.guidance_embeds:
            guidance = torch.full_like(timestep, _GUIDANCE)

        def repeated(value: torch.Tensor) -> torch.Tensor:
            """Each row as often as there are pictures."""
            if strength is None:
                return value
            return value[:, None].expand(-1, pictures, *value.shape[1:]).flatten(0, 1)

        if strength is not None:
            controlnet_cond = controlnet_cond.flatten(0, 1)
        given = [prompt_hidden_states, prompt_pooled_projections, timestep / TIMESTEPS]
        text, pooled, time = (repeated(value) for value in given)
        doubles, singles = self.model(
            repeated(packed(sample, 2)),
            controlnet_cond if self.model.input_hint_block is not None else packed(controlnet_cond, 2),
            None if control_type is None else control_type.flatten(0, 1)[:, None],
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            img_ids=positions(sample.shape[2] // 2, sample.shape[3] // 2, sample.device),
            txt_ids=text_positions(text),
            guidance=None if guidance is None else repeated(guidance),
            return_dict=False,
        )
        made = [(value or ())[i] for value, read in zip((doubles, singles), self.read, strict=True) for i in read]
        if strength is not None:
            made = [(each.unflatten(0, (rows, pictures)) * strength[..., None, None]).sum(1) for each in made]
        return _scaled(made, scale)


def _scaled(made: Sequence[torch.Tensor], scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each residual, (B, tokens, C), times its factor in `scale`, (B, residuals)."""
    return tuple(value * scale[:, i, None, None] for i, value in enumerate(made))


_WRAPPERS: dict[str, Callable[[Any, Layout], torch.nn.Module]] = {
    SD3: StableDiffusion3Control,
    FLUX: FluxControl,
}
_RESIDUALS = {
    "FluxTransformer2DModel": ("controlnet_block_samples", "controlnet_single_block_samples"),
    "SD3Transformer2DModel": ("block_controlnet_hidden_states", ""),
}
"""The arguments of each class of transformers that take residuals, after blocks and after single blocks."""


def taking_residuals(
    module: Any, layouts: Sequence[Layout], inputs: Sequence[Tensor], tokens: Sequence[Tokens] = ()
) -> Any:
    """`module`, which wraps a transformer, with residuals of these layouts, and tokens, as further inputs.

    Residuals are given to the model block by block, which is how each of its blocks may have another sum.
    """
    plain, known = module.forward, {name for each in layouts for name in each.residuals}
    names = _RESIDUALS[type(module.model).__name__]
    told = {name for each in tokens for name in (each.tokens, each.scale)}
    if tokens:
        read_tokens(module.model, tokens)

    def forward(**given: Any) -> Any:
        found: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for name, value in given.items():
            residual = name.partition(".")[0].partition("__")[0]
            if residual in known:
                found[residual] = found[residual] + value if residual in found else value
            elif name not in told:
                own[name] = value
        count, single_count = (len(layouts[0].blocks), len(layouts[0].single_blocks)) if layouts else (0, 0)
        blocks = [_sum(found[of] for each in layouts if (of := each.block(i))) for i in range(count)]
        singles = [_sum(found[of] for each in layouts if (of := each.single_block(i))) for i in range(single_count)]
        every = zip(names, (blocks, singles), strict=True)
        added: dict[str, Any] = {name: each for name, each in every if any(v is not None for v in each)}
        if tokens:
            added["joint_attention_kwargs"] = given_tokens(module.model, tokens, given)
        return plain(**own, added=added)

    arguments = [inspect.Parameter(argument(each.name), inspect.Parameter.KEYWORD_ONLY) for each in inputs]
    forward.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]  # which tracing reads
    module.forward = forward
    return module


def _sum(values: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """None of none."""
    total = None
    for value in values:
        total = value if total is None else total + value
    return total


def controlnet(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`, which reads what the transformer reads, a picture, and a scale for each residual."""
    wired = next(each for each in pipeline.wiring.controls.values() if each.component == name)
    config, of_transformer = control_config(checkpoint, name.removeprefix(PREFIX)), transformer_config(checkpoint)
    raw, made = checkpoint.config(name), layout(config, of_transformer)
    kind = CONTROLNETS[of_transformer["_class_name"]]
    denoiser, patch, wrap = _denoiser(checkpoint, pipeline), pipeline.latents.multiple, _WRAPPERS[kind]
    # the first ControlNets of Stable Diffusion 3.5's large model take the positions, and the tokens, from the model
    borrows = kind == SD3 and not config["use_pos_embed"]

    def load() -> Any:
        model = load_mapped(getattr(diffusers, kind), checkpoint.folder(name), raw)
        if borrows:
            model.pos_embed = _pos_embed(checkpoint)
        return wrap(model, made).eval()

    def without_weights() -> Any:
        model = hollow(getattr(diffusers, kind), raw)
        if borrows:
            model.pos_embed = _hollow_transformer(checkpoint).pos_embed
        return wrap(model, made).to("meta")

    many = wired.kind == "union"
    rows = ("batch_size", PICTURES) if many else ("batch_size",)
    sides = ("height", "width") if wired.encoded else ("sample_height", "sample_width")
    text = [] if kind == SD3 and config["joint_attention_dim"] is None else ["encoder_hidden_states"]
    pooled = [] if kind == SD3 and config["force_zeros_for_pooled_projection"] else ["pooled_projections"]
    read = {"sample", "timestep", *text, *pooled, *(["guidance"] if config.get("guidance_embeds") else [])}
    inputs = []
    for tensor in (tensor for tensor in pipeline.inputs if tensor.name in read):
        source = pipeline.wiring.inputs[tensor.name]
        inputs.append(
            replace(tensor, name=next((own for own, of in wired.of_prompt.items() if of == source), tensor.name))
        )
    inputs += [
        Tensor(PICTURE, "float32", (*rows, wired.channels, *sides)),
        Tensor(SCALE, "float32", ("batch_size", wired.residuals)),
    ]
    if many:
        inputs += [Tensor(MODE, "float32", (*rows, wired.modes)), Tensor(STRENGTH, "float32", rows)]
    axes = {axis: replace(each, high=min(each.high, wired.most or each.high)) for axis, each in denoiser.axes.items()}
    down = pipeline.latents.downscale
    return replace(
        denoiser,
        name=name,
        source=name,
        load=load,
        hollow=without_weights,
        twin=None,
        inputs=tuple(inputs),
        outputs=residuals(made, of_transformer, patch),
        axes={**denoiser.axes, "height": axes["height"], "width": axes["width"]}
        | ({PICTURES: Axis(1, 3)} if many else {}),
        tied={"sample_height": ("height", down, 1), "sample_width": ("width", down, 1), **_sides(patch)},
        products=_products(patch),
        per_prompt=tuple(
            tensor.name for tensor in inputs if tensor.name in (*denoiser.per_prompt, *wired.of_prompt, PICTURE, MODE)
        ),
        more_sources=(TRANSFORMER,) if borrows else (),
    )


def controlled_transformer(checkpoint: Checkpoint, name: str, pipeline: Pipeline) -> ComponentSpec:
    """The component `name`: the transformer that takes residuals."""
    denoiser, of_transformer = _denoiser(checkpoint, pipeline), transformer_config(checkpoint)
    patch = pipeline.latents.multiple
    made = [
        layout(control_config(checkpoint, wired.component.removeprefix(PREFIX)), of_transformer)
        for wired in pipeline.wiring.controls.values()
    ]
    prompts = [Tokens.of(checkpoint, wired) for wired in pipeline.wiring.image_prompts.values()]

    def with_residuals(
        plain: ComponentSpec, layouts: Sequence[Layout], read: Sequence[Tokens] = prompts
    ) -> ComponentSpec:
        counts = {each: min(layouts.count(each), MOST_SLOTS) for each in layouts}
        taken = [
            replace(tensor, name=slot(tensor.name, k))
            for each, count in counts.items()
            for k in range(count)
            for tensor in residuals(each, of_transformer, patch)
        ]
        inputs = (*plain.inputs, *taken, *(tensor for each in read for tensor in each.inputs))
        return replace(
            plain,
            name=name,
            load=lambda: taking_residuals(plain.load(), list(counts), inputs, read),
            hollow=lambda: taking_residuals(plain.hollow(), list(counts), inputs, read).to("meta"),
            inputs=inputs,
            axes={**plain.axes, **{f"{each.tokens}_length": Axis(1, 6) for each in read}},
            tied=_sides(patch),
            products=_products(patch),
            per_prompt=(*plain.per_prompt, *(each.tokens for each in read)),
            more_sources=tuple(each.component for each in read),
        )

    def twin() -> ComponentSpec:
        assert denoiser.twin is not None
        few = denoiser.twin()
        return with_residuals(few, [each.ends() for each in made], [each.ends(of_transformer) for each in prompts])

    return replace(with_residuals(denoiser, made), twin=twin, shares=denoiser.name)


def _denoiser(checkpoint: Checkpoint, pipeline: Pipeline) -> ComponentSpec:
    name = next(name for name, part in pipeline.parts.items() if part.role == "denoiser")
    return transformer(checkpoint, name, pipeline)


def _hollow_transformer(checkpoint: Checkpoint) -> Any:
    kind = getattr(diffusers, transformer_config(checkpoint)["_class_name"])
    return hollow(kind, checkpoint.config(TRANSFORMER))


def _pos_embed(checkpoint: Checkpoint) -> Any:
    """The part of the transformer that makes tokens of latents, in float32."""
    made, stored = _hollow_transformer(checkpoint).pos_embed, checkpoint.weights(TRANSFORMER)
    tensors = stored.read()
    made.load_state_dict({name: tensors[f"pos_embed.{name}"].float() for name in made.state_dict()}, assign=True)
    return made.requires_grad_(False)


def _sides(patch: int) -> dict[str, tuple[str, int, int]]:
    """The sides of a picture in tokens."""
    return {side(axis, patch.bit_length() - 1): (axis, 1, patch) for axis in ("height", "width") if patch > 1}


def _products(patch: int) -> dict[str, tuple[str, str]]:
    return {tokens(patch): (side("height", patch.bit_length() - 1), side("width", patch.bit_length() - 1))}
