"""Tokens of pictures that a transformer reads beside the text, through an IP-Adapter: diffusers' own processors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from ...bundle import Tensor
from ...bundle.wiring import ImagePrompt
from ...common.errors import CheckpointError, reason
from ...families.image_prompt import PREFIX, SD3, Adapter, inputs
from ..checkpoint import Checkpoint
from ..ip_adapter import IPAdapterFile
from .image_prompt import open_adapter, projection_of
from .transformer import Frequencies


@dataclass(frozen=True, slots=True)
class Tokens:
    """An adapter whose tokens a transformer reads.

    wired: as the bundle has it. file, adapter: what it was read from. layers: the weights of each attention that reads
    them, by their names.
    """

    wired: ImagePrompt
    file: IPAdapterFile
    adapter: Adapter
    layers: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, wired: ImagePrompt) -> Tokens:
        """The adapter of the checkpoint that `wired` names."""
        file = open_adapter(checkpoint, wired)
        return cls(wired, file, file.describe(wired.encoder), file.parts())

    def ends(self, transformer: Mapping[str, Any]) -> Tokens:
        """That of a transformer with its first and its last block alone. transformer: the whole's configuration."""
        count, doubled = int(transformer["num_layers"]), transformer.get("dual_attention_layers") or ()
        own = iter(self.layers)
        blocks = [[next(own) for _ in range(1 + (i in doubled))] for i in range(count)]
        chosen = [layer for block in (blocks if count < 3 else (blocks[0], blocks[-1])) for layer in block]
        return replace(self, wired=replace(self.wired, layers=len(chosen)), layers=chosen)

    @property
    def component(self) -> str:
        """That which makes its tokens, or what they are made of."""
        return self.wired.component

    @property
    def tokens(self) -> str:
        """The input of the transformer that takes them."""
        return self.wired.tokens

    @property
    def scale(self) -> str:
        """The input that takes a factor for each attention."""
        return self.wired.scale

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Both."""
        return inputs(self.wired, self.adapter.token_width or self.adapter.text_width)


class ReadingTokens(SD3IPAdapterJointAttnProcessor2_0):
    """An attention of Stable Diffusion 3 that reads tokens, too, with a scale for each row.

    scale: (B, 1, 1). That of diffusers has one number, which it holds against 0, and a view that no tracer takes.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        ip_hidden_states: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> Any:
        """What the attention makes of the picture, and of the text where there is one."""

        def heads(value: torch.Tensor) -> torch.Tensor:
            rows, length, _ = value.shape
            return value.view(rows, length, attn.heads, -1).transpose(1, 2)

        def normed(norm: Any, value: torch.Tensor) -> torch.Tensor:
            return value if norm is None else norm(value)

        query, key, value = (heads(each(hidden_states)) for each in (attn.to_q, attn.to_k, attn.to_v))
        joint = [normed(attn.norm_q, query), normed(attn.norm_k, key), value]
        if encoder_hidden_states is not None:
            made = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k, None)
            text = [normed(n, heads(each(encoder_hidden_states))) for n, each in zip(norms, made, strict=True)]
            joint = [torch.cat(pair, 2) for pair in zip(joint, text, strict=True)]
        whole = functional.scaled_dot_product_attention(*joint).transpose(1, 2).flatten(2)
        own = whole[:, : hidden_states.shape[1]]
        tokens = self.norm_ip(ip_hidden_states, temb=temb)
        keys = torch.cat([self.norm_k(key), self.norm_ip_k(heads(self.to_k_ip(tokens)))], 2)
        values = torch.cat([value, heads(self.to_v_ip(tokens))], 2)
        seen = functional.scaled_dot_product_attention(self.norm_q(query), keys, values).transpose(1, 2).flatten(2)
        own = attn.to_out[0](own + seen * self.scale)
        if encoder_hidden_states is None:
            return own
        of_text = whole[:, hidden_states.shape[1] :]
        return own, of_text if attn.context_pre_only else attn.to_add_out(of_text)


def read_tokens(model: Any, adapters: Sequence[Tokens]) -> None:
    """Let the attentions of `model`, a transformer of diffusers, read the tokens of `adapters`."""
    first, config = adapters[0], model.config
    if first.adapter.of == SD3:
        projection = projection_of(first.file, first.component, first.adapter)
        projection.proj_in = torch.nn.Identity()  # which the component of the adapter has done
        projection.time_proj = Frequencies(projection.time_proj)
        model.image_proj = projection
    for i, attention in enumerate(_attentions(model)):
        if first.adapter.of == SD3:
            own = first.layers[i]
            made: Any = ReadingTokens(
                first.adapter.text_width,
                first.adapter.text_width,
                config.attention_head_dim,
                int(own["norm_ip.linear.weight"].shape[1]),
            )
        else:
            counts = [each.adapter.tokens for each in adapters]
            made = FluxIPAdapterAttnProcessor(model.inner_dim, config.joint_attention_dim, counts)
            own = {
                f"{part}.{k}.{kind}": each.layers[i][f"{part}.{kind}"]
                for k, each in enumerate(adapters)
                for part in ("to_k_ip", "to_v_ip")
                for kind in ("weight", "bias")
            }
        try:
            made.load_state_dict({name: tensor.float() for name, tensor in own.items()}, assign=True)
        except RuntimeError as error:  # torch's, for weights that do not fit
            names = " or ".join(each.component.removeprefix(PREFIX) for each in adapters)
            raise CheckpointError(
                f"the IP-Adapter {names} does not fit attention {i} of the checkpoint ({reason(error):.200}): give one "
                "that was trained with this kind of checkpoint"
            ) from None
        attention.set_processor(made.requires_grad_(False))


def given_tokens(model: Any, adapters: Sequence[Tokens], given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of the attentions for the tokens and scales in `given`; the scales are set in `model`."""
    tokens = [given[each.tokens].squeeze(1) for each in adapters]
    scales = [given[each.scale] for each in adapters]
    for i, attention in enumerate(_attentions(model)):
        rows = [each[:, i, None, None] for each in scales]
        attention.processor.scale = rows[0] if adapters[0].adapter.of == SD3 else rows
    if adapters[0].adapter.of == SD3:
        return {"ip_adapter_image_embeds": tokens[0]}
    return {"ip_hidden_states": tokens}


def _attentions(model: Any) -> list[Any]:
    """Those that read tokens, in diffusers' order."""
    found = []
    for block in model.transformer_blocks:
        found += [each for each in (block.attn, getattr(block, "attn2", None)) if each is not None]
    return found
