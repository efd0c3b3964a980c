"""What a pipeline is, as data: how texts, latents and guidance reach the denoiser. A family is one such wiring."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..common.checks import LARGEST_SIDE
from .reader import Rule

_SMALLEST, _LARGEST = 1e-12, 1e30
_SHORTEST_WINDOW = 3  # start, one token, end
_MOST_TOKENS = 1 << 31
_MOST_CHANNELS = 1 << 12
MOST_MODES = 64
MOST_RANK = 1024
MOST_TOKENS = 1024
NAME = re.compile(r"[A-Za-z0-9]\w{0,39}", re.ASCII)
"""How controls and IP-Adapters are called."""

LONGEST_BESIDE = 4096
"""Characters of the texts that a prompt is put between, at most."""
_LARGEST_PATCH = 64
_MOST_DOWNSCALE = 256

AtLeast1 = Annotated[int, Rule(lambda value: value >= 1, "be at least 1")]
Patch = Annotated[int, Rule(lambda value: 1 <= value <= _LARGEST_PATCH, f"be from 1 to {_LARGEST_PATCH}")]
Downscale = Annotated[int, Rule(lambda value: 1 <= value <= _MOST_DOWNSCALE, f"be from 1 to {_MOST_DOWNSCALE}")]
NotZero = Annotated[float, Rule(lambda value: _SMALLEST <= abs(value) <= _LARGEST, "be a number other than zero")]
Shift = Annotated[float, Rule(lambda value: abs(value) <= _LARGEST, f"be from {-_LARGEST:g} to {_LARGEST:g}")]
TokenId = Annotated[int, Rule(lambda value: 0 <= value < _MOST_TOKENS, f"be from 0 to {_MOST_TOKENS - 1}")]
Channels = Annotated[int, Rule(lambda value: 1 <= value <= _MOST_CHANNELS, f"be from 1 to {_MOST_CHANNELS}")]
Rank = Annotated[int, Rule(lambda value: 1 <= value <= MOST_RANK, f"be from 1 to {MOST_RANK}")]
Modes = Annotated[int, Rule(lambda value: 0 <= value <= MOST_MODES, f"be from 0 to {MOST_MODES}")]
Tokens = Annotated[int, Rule(lambda value: 0 <= value <= MOST_TOKENS, f"be from 0 to {MOST_TOKENS}")]
Share = Annotated[float, Rule(lambda value: 0 < value <= 1, "be above 0 and at most 1")]
Side = Annotated[int, Rule(lambda value: 0 <= value <= LARGEST_SIDE, f"be from 0 to {LARGEST_SIDE}")]
Beside = Annotated[str, Rule(lambda value: len(value) <= LONGEST_BESIDE, f"be {LONGEST_BESIDE} characters at most")]
Pixels = Annotated[int, Rule(lambda value: 16 <= value <= LARGEST_SIDE, f"be from 16 to {LARGEST_SIDE}")]
Window = Annotated[int, Rule(lambda value: _SHORTEST_WINDOW <= value < _MOST_TOKENS, f"be at least {_SHORTEST_WINDOW}")]


Role = Literal[
    "text",
    "denoiser",
    "encoder",
    "decoder",
    "preview",
    "step",
    "control",
    "controlled",
    "image",
    "image_prompt",
    "lora",
]
"""What a component does: `preview` is a second, small decoder, `step` the step of the loop as a graph.

`control` makes of a picture what is added inside the denoiser, `image` encodes one and `image_prompt` makes tokens of
that; `controlled` is the denoiser that takes both, and `lora` the one that takes the factors of LoRAs.
"""
STEPPING: tuple[Role, ...] = ("denoiser", "controlled", "control", "lora")
"""Roles of what is called at every step."""
TASKS: dict[str, tuple[Role, ...]] = {
    "txt2img": ("decoder",),
    "img2img": ("encoder", "decoder"),
    "inpaint": ("encoder", "decoder"),
}
"""What there is to do, and the roles that each needs beside text encoders and denoiser."""
SOURCES = {
    "latents": "the latents of the step",
    "latents.masked": "the latents, the mask and the masked image, along the channels",
    "latents.filled": "the latents, the masked image and the mask, each of its pixels a channel, along the channels",
    "latents.beside": "the latents, and those of the picture, along the channels",
    "picture": "the latents of the picture",
    "timestep": "the timestep of each row",
    "text.hidden": "the hidden states of the text encoders, joined",
    "text.pooled": "their pooled embeddings, joined",
    "text.mask": "1 for each of the hidden states that stands for a token of the prompt, 0 for others",
    "sizes": "original size, crop and target size of the picture (6 numbers)",
    "sizes.scored": "original size, crop and aesthetic score (5 numbers)",
    "guidance": "the guidance scale",
    "guidance.sinusoid": "sines and cosines of the guidance scale",
    "layers": "1 for each layer that is run, 0 for one that is skipped",
}
"""What an input of a denoiser can be fed with."""
_EACH_STEP = ("latents", "timestep", "layers")
"""Sources that begin so are not the prompt's: they change with the step, or with the prediction."""


def plain(source: str) -> str:
    """A source without what goes along with it: `latents` for what has them and something beside them."""
    return "latents" if source.startswith("latents.") else source


@dataclass(frozen=True, slots=True)
class Latents:
    """How latents relate to pixels: `x_vae = x · std / scaling_factor + shift_factor + mean`, channel by channel.

    downscale: pixels a latent. tile: side of a tile, in latents, when large images are worked through in tiles.
    mean, std: one number a channel, or empty for 0 and 1. multiple: what the denoiser takes, in latents a side.
    encoded: what the encoder gives: `parameters`, mean and log variance to draw from, or the latents as a `sample`.
    inpaint_by_factor: whether what is inpainted is encoded without mean and std.
    """

    channels: Channels
    downscale: Downscale
    scaling_factor: NotZero
    shift_factor: Shift = 0.0
    tile: AtLeast1 = 64
    mean: tuple[Shift, ...] = ()
    std: tuple[NotZero, ...] = ()
    multiple: Patch = 1
    encoded: Literal["parameters", "sample"] = "parameters"
    inpaint_by_factor: bool = False

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == (self.channels if self.mean else 0):
            raise ValueError("mean and std must both be empty, or hold one number a channel each")

    @property
    def unit(self) -> int:
        """What the sides of a picture must be multiples of, in pixels."""
        return self.downscale * self.multiple


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """How text becomes the token ids of one text encoder. max_length: its window, in tokens.

    bos_token_id: the token that begins a window, None where none does, as in T5's; eos_token_id: the one after the
    text, None where none is, as in Qwen's. before, after: the texts that a prompt is put between, which are part of
    what has to fit.
    """

    max_length: Window
    bos_token_id: TokenId | None
    eos_token_id: TokenId | None
    pad_token_id: TokenId
    before: Beside = ""
    after: Beside = ""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """One text encoder, and what the denoiser reads of it.

    component: its name. tokenizer: the folder of its tokenizer. text: 0 for `prompt`, 1 for `prompt_2`, 2 for
    `prompt_3`, which are `prompt` where none are given.
    hidden: the output that becomes hidden states, "" for none; skips: those in its place when 1, 2, … layers are
    skipped. pooled: the output that becomes the pooled embedding, "" for none.
    join: how its hidden states join those of the encoders before it: side by side along the `width`, or after them
    along the `sequence`, where the narrower ones are filled with zeros.
    length: tokens of its window where a request may choose how many, up to the tokenizer's; 0 where it may not.
    bucket: where a window is as long as its prompt, the number that its tokens are a multiple of; `length` is then the
    most of them. most: tokens that the denoiser has positions for, 0 for any number.
    """

    component: str
    tokenizer: str
    text: Literal[0, 1, 2] = 0
    hidden: str = "last_hidden_state"
    skips: tuple[str, ...] = ()
    pooled: str = ""
    join: Literal["width", "sequence"] = "width"
    length: Tokens = 0
    bucket: Tokens = 0
    most: Tokens = 0

    def __post_init__(self) -> None:
        if self.bucket and (not self.length or self.length % self.bucket):
            raise ValueError("the length of a window as long as its prompt must be a multiple of its bucket")


@dataclass(frozen=True, slots=True)
class Flow:
    """How a pipeline of flow matching asks for its schedule.

    patch: latents a side of a token; the tokens of a picture decide how far a schedule is shifted that shifts with
    its size. even: whether the steps are even in sigma, from 1 down to one over their number, before they are shifted.
    max_shift: of the largest picture, where the scheduler's configuration does not tell. strength: how much of the
    schedule a picture is drawn anew for, where a request does not tell; inpaint_strength: the same with a mask, None
    where it makes no difference. most: tokens a side, 0 for any number.
    """

    patch: Patch
    even: bool = False
    max_shift: float = 1.15
    strength: Share = 0.6
    inpaint_strength: Share | None = None
    most: Side = 0

    def usual_strength(self, task: str) -> float:
        """The strength of a task of `TASKS` where a request tells none."""
        return (self.inpaint_strength if task == "inpaint" else None) or self.strength


PICTURE_SIDES = ("picture_height", "picture_width")
"""The axes of what `picture` feeds; the first is 0 where there is no picture, which then has no tokens."""
PICTURE, SCALE = "controlnet_cond", "scale"
"""Inputs of a control that no denoiser has: the picture, and a factor for each residual."""
MODE, STRENGTH = "control_type", "strength"
"""Inputs of a ControlNet-Union beside these, for each of its pictures: what it is of, as ones and zeros, and a
factor."""


@dataclass(frozen=True, slots=True)
class Control:
    """A component that makes, of a picture, residuals which are added inside the denoiser (Zhang et al. 2023).

    component: its name. residuals: how many it makes; each is scaled by itself. channels: of what it is given.
    global_pool: whether each residual is one number a channel, and the negative prompt goes without, as in guess mode.
    kind: a `controlnet`, an `adapter` (T2I-Adapter, Mou et al. 2023), which reads the picture alone, or a `union`, a
    ControlNet that reads pictures of several modes. modes: how many it knows. mode_names: of the first of them, where
    they are not those of `families.control`.
    multiple: what the sides of the latents must be multiples of. most: latents a side, 0 for any number.
    reads: what it is given: pixels from 0 to 1 (`pixels`) or from -1 to 1 (`signed`), or the latents of the picture,
    the likeliest (`latents`) or some that are drawn with the seed (`drawn`).
    shifted: whether such latents are shifted as the others are. masked: whether it is given a mask beside them.
    guess: whether it knows guess mode. of_prompt: by its inputs, the sources of those that are fed as in the rows of
    the prompt in the rows of the negative prompt, too.
    """

    component: str
    residuals: AtLeast1
    channels: AtLeast1 = 3
    global_pool: bool = False
    kind: Literal["controlnet", "adapter", "union"] = "controlnet"
    multiple: Patch = 1
    modes: Modes = 0
    mode_names: tuple[str, ...] = ()
    most: Side = 0
    reads: Literal["pixels", "signed", "latents", "drawn"] = "pixels"
    shifted: bool = True
    masked: bool = False
    guess: bool = True
    of_prompt: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.kind == "union") != (self.modes > 0):
            raise ValueError("a union must have modes, and no other control any")
        if self.masked and not self.encoded:
            raise ValueError("a control that is given a mask must be given latents")
        if set(self.of_prompt.values()) - set(SOURCES):
            raise ValueError("of_prompt must name sources of the denoiser's inputs")

    @property
    def encoded(self) -> bool:
        """Whether it is given the latents of the picture."""
        return self.reads in ("latents", "drawn")


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """A component that makes tokens of an encoded picture, which the denoiser reads beside the text (Ye et al. 2023).

    component: its name. encoder: that of the component which encodes pictures, "" where embeddings are given in their
    place. output: of the encoder, that it reads.
    layers: how many attentions of the denoiser read its tokens; each is scaled by itself. tokens, scale, masks: the
    inputs of the denoiser; there is a mask for each size of picture that cross-attentions read, and none where the
    tokens are read everywhere.
    side, mean, std: of the pictures that the encoder reads, in pixels, and of their channels. stretched: whether they
    are stretched to the side, rather than cropped to the middle.
    negative: what the rows of the negative prompt read where a request names no picture: the tokens of a `black` one,
    of `zeros` in the place of what the encoder gives, or of an embedding of zeros and the hidden states of a picture of
    zeros (`usual`). several: whether one drawing may read several pictures.
    """

    component: str
    encoder: str
    output: str
    layers: AtLeast1
    tokens: str
    scale: str
    masks: tuple[str, ...]
    side: AtLeast1
    mean: tuple[Shift, Shift, Shift]
    std: tuple[NotZero, NotZero, NotZero]
    stretched: bool = False
    negative: Literal["usual", "black", "zeros"] = "usual"
    several: bool = True

    def __post_init__(self) -> None:
        if self.negative == "black" and not self.encoder:
            raise ValueError("an image prompt without an encoder reads no black picture")

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the denoiser takes of it."""
        return self.tokens, self.scale, *self.masks


@dataclass(frozen=True, slots=True)
class LoraInputs:
    """A denoiser that takes the factors of LoRAs as inputs (Hu et al. 2021), a set for all rows or one for each.

    rank: the most, of all LoRAs of a row together. weights: of the checkpoint, those that factors can change, in the
    order of their rows in both inputs. down, up: the names of the inputs.
    """

    rank: Rank
    weights: tuple[str, ...]
    down: str = "lora_down"
    up: str = "lora_up"


@dataclass(frozen=True, slots=True)
class Wiring:
    """How a denoiser is fed.

    text: its text encoders, in the order in which their outputs are joined. inputs: for each input of the denoiser
    its source, one of `SOURCES`.
    empty_negative_is_zeros: whether no negative prompt means zeros, rather than the encoded empty text.
    strength_by_sampler: whether a sampler of consistency models spreads its steps over the strength itself.
    controls, image_prompts: by the name that a request calls each by. lora_inputs: by component.
    flow: of a pipeline of flow matching. zeros: tokens of zeros that follow the hidden states of the text, in the
    place of an encoder that the checkpoint does without; a request may choose how many.
    picture_sizes: width and height, in pixels, of those that the denoiser reads a picture in; it is brought to the one
    of the nearest shape.
    guidance_added: what is added to the guidance that a request asks for: 1 where its pipelines take 0 for none.
    """

    text: tuple[TextEncoder, ...]
    inputs: dict[str, str] = field(default_factory=dict)
    empty_negative_is_zeros: bool = False
    strength_by_sampler: bool = False
    controls: dict[str, Control] = field(default_factory=dict)
    image_prompts: dict[str, ImagePrompt] = field(default_factory=dict)
    lora_inputs: dict[str, LoraInputs] = field(default_factory=dict)
    flow: Flow | None = None
    zeros: Tokens = 0
    picture_sizes: tuple[tuple[Pixels, Pixels], ...] = ()
    guidance_added: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        if len(self.text) > 1 and any(each.bucket for each in self.text):
            raise ValueError("a text encoder whose windows are as long as their prompts must be the only one")

    @property
    def edits(self) -> bool:
        """Whether the denoiser sees the picture of a request, rather than starting from it."""
        return bool(self.inputs_from("picture") or self.inputs_from("latents.beside"))

    def inputs_from(self, source: str) -> list[str]:
        """The inputs of the denoiser that `source` feeds."""
        return [name for name, each in self.inputs.items() if each == source]

    def per_prompt(self) -> tuple[str, ...]:
        """The inputs of the denoiser that stay the same from step to step."""
        return tuple(name for name, each in self.inputs.items() if not each.startswith(_EACH_STEP))
