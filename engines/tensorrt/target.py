"""What TensorRT plans are built for: architectures, shapes, batch, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...bundle import Manifest
from ...bundle.reader import fits
from ...bundle.wiring import PICTURE_SIDES, STEPPING
from ...common.checks import LARGEST_SIDE, MOST_IMAGES, is_whole
from ...common.errors import DiffoundryError
from ...families.control import PICTURES, halved
from ..fusion.lora import RANK, SETS
from .plan import FLAGS, Profile, Shape

Size = tuple[int, int]
"""Width and height, in pixels."""

_MOST_PROMPTS = 8
"""Prompts that a plan of a text encoder takes at once, at least."""
_REGISTERS = 1, 2, 12
"""Latents that a sampler keeps between its steps; with forecasts four more."""
_STEPS = 1, 20, 1000


@dataclass(frozen=True, slots=True)
class Target:
    """archs: GPU architectures, as `sm89`; empty for the GPU that is here. sizes: of pictures, one static plan each
    (empty: the checkpoint's own). dynamic: the smallest and largest size of one plan that takes all between them.
    batch: the fewest and most images of a call. tokens: of a prompt, the fewest and most that a request may choose as
    its `max_sequence_length` (None: it may not choose another number than the model's own).
    flags: of `engines.tensorrt.plan.FLAGS`.
    memory_limit: bytes that the builder may take.
    """

    archs: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    dynamic: tuple[Size, Size] | None = None
    batch: tuple[int, int] = (1, 1)
    tokens: tuple[int, int] | None = None
    flags: tuple[str, ...] = ()
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("archs", self.archs), ("flags", self.flags)):
            _need(fits(tuple[str, ...], value), f"{name} must be a tuple of names, found {value!r:.80}")
        for flag in self.flags:
            _need(flag in FLAGS, f"unknown flag {flag!r} of a plan: choose from {', '.join(FLAGS)}")
        for size in self.sizes if isinstance(self.sizes, (tuple, list)) else (self.sizes,):
            _check_size(size)
        if self.dynamic is not None:
            two = isinstance(self.dynamic, (tuple, list)) and len(self.dynamic) == 2
            _need(two, f"dynamic must be the smallest and the largest size, found {self.dynamic!r:.80}")
            for size in self.dynamic:
                _check_size(size)
            ordered = all(low <= high for low, high in zip(*self.dynamic, strict=True))
            _need(ordered, "the dynamic sizes must be given as MIN-MAX, such as 256x256-1024x1024")
        pair = fits(tuple[int, int], self.batch)
        _need(pair, f"batch must be the fewest and the most images, found {self.batch!r:.80}")
        low, high = self.batch
        _need(
            1 <= low <= high <= MOST_IMAGES,
            f"the batch must be from 1 to {MOST_IMAGES} images, the smaller number first, found {low}-{high}",
        )
        if self.tokens is not None:
            pair = fits(tuple[int, int], self.tokens)
            _need(pair, f"tokens must be the fewest and the most of a prompt, found {self.tokens!r:.80}")
            low, high = self.tokens
            _need(
                1 <= low <= high,
                f"the tokens of a prompt must be 1 or more, the smaller number first, found {low}-{high}",
            )
        limit = self.memory_limit
        _need(
            limit is None or (is_whole(limit) and limit > 0),
            f"the memory of the builder must be a number of bytes above 0, found {limit!r:.80}",
        )

    def count(self) -> int:
        """How many plans a component has whose shapes follow the size of the picture."""
        return (len(set(self.sizes)) or int(self.dynamic is None)) + int(self.dynamic is not None)

    def all_sizes(self, manifest: Manifest) -> list[tuple[Size, Size, Size]]:
        """The least, usual and largest size of each plan; static ones first.

        Raises `DiffoundryError` for a side that the checkpoint cannot do.
        """
        own = (manifest.default_width, manifest.default_height)
        static = self.sizes or (() if self.dynamic else (own,))
        ranges = [(size, size, size) for size in dict.fromkeys(static)]
        if self.dynamic is not None:
            low, high = self.dynamic
            usual = tuple(min(max(side, a), b) for side, a, b in zip(own, low, high, strict=True))
            ranges.append((low, (usual[0], usual[1]), high))
        unit = manifest.latents.unit
        for side in (side for part in ranges for size in part for side in size):
            _need(
                unit <= side <= LARGEST_SIDE and side % unit == 0,
                f"the sides of a shape must be multiples of {unit} from {unit} to {LARGEST_SIDE}, found {side}",
            )
        return ranges

    def all_tokens(self, manifest: Manifest) -> tuple[int, int, int] | None:
        """The least, usual and largest number of tokens that a request may choose, None where it may not choose.

        Raises `DiffoundryError` for what no request of this bundle can choose.
        """
        bucket = max((each.bucket for each in manifest.wiring.text), default=0)
        usual = max([*(each.length for each in manifest.wiring.text), manifest.wiring.zeros])
        if self.tokens is None:
            return (bucket, min(2 * bucket, usual), usual) if bucket else None
        (low, high), most = self.tokens, manifest.longest_text
        _need(most > 0, "the text encoders of this bundle have windows of one length: leave --tokens out")
        _need(high <= most, f"this model reads at most {most} tokens of a prompt, found --tokens {_range(self.tokens)}")
        _need(
            not bucket or low % bucket == high % bucket == 0,
            f"prompts of this model are filled up to a multiple of {bucket} tokens: give --tokens in multiples of it",
        )
        return low, min(max(usual if not bucket else 2 * bucket, low), high), high


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise DiffoundryError(message)


def _check_size(size: object) -> None:
    _need(fits(tuple[int, int], size), f"a size must be a width and a height, such as (512, 768), found {size!r:.80}")


def profiles(manifest: Manifest, component: str, target: Target) -> list[Profile]:
    """The profiles that `component` is built for: one a size, or one in all where the size does not matter to it."""
    ranges, chosen = target.all_sizes(manifest), target.all_tokens(manifest)
    role = manifest.components[component].role
    if role == "text":
        encoder = next(each for each in manifest.wiring.text if each.component == component)
        tokens, rows = (manifest.tokens_of(encoder),) * 3, max(_MOST_PROMPTS, 2 * target.batch[1])
        if chosen is not None and encoder.length:
            tokens = chosen
        axes = {"batch_size": (1, 2, rows), "sequence_length": tokens}
        return [_profile(manifest, component, f"{_range(tokens)} tokens, 1-{rows} prompts", axes)]
    if role in ("image", "image_prompt"):
        return [_profile(manifest, component, f"1-{_MOST_PROMPTS} images", {"batch_size": (1, 1, _MOST_PROMPTS)})]
    if role == "step":
        return [_step_profile(manifest, component, target, ranges)]
    shown = manifest.wiring.picture_sizes
    if role == "encoder" and shown:  # which encodes the picture that is seen, and those of controls alone
        widths, heights = zip(*shown, strict=True)
        also = ranges if any(each.encoded for each in manifest.wiring.controls.values()) else []
        ranges = [((min(widths), min(heights)), _middle(shown), (max(widths), max(heights))), *also]
    return [_sized_profile(manifest, component, target, sizes) for sizes in ranges]


def rows_of_denoiser(manifest: Manifest, batch: tuple[int, int]) -> tuple[int, int, int]:
    """The least, usual and largest number of rows of a call: two an image where it is guided."""
    given = any(source.startswith("guidance") for source in manifest.wiring.inputs.values())
    halves = 2 if manifest.default_guidance + manifest.wiring.guidance_added > 1 and not given else 1
    low, high = batch
    return (halves * low,) * 3 if low == high else (low, halves * low, halves * high)


def _middle(sizes: Sequence[Size]) -> Size:
    """Of several sizes the one nearest to a square."""
    return min(sizes, key=lambda size: max(size) / min(size))


def _range(numbers: Sequence[int]) -> str:
    """The first and the last, or the one that both are."""
    return "-".join(map(str, dict.fromkeys((numbers[0], numbers[-1]))))


def _sized_profile(manifest: Manifest, component: str, target: Target, sizes: tuple[Size, Size, Size]) -> Profile:
    down = manifest.latents.downscale
    widths, heights = (tuple(size[i] for size in sizes) for i in (0, 1))
    latent_widths, latent_heights = (tuple(side // down for side in sides) for sides in (widths, heights))
    chosen = target.all_tokens(manifest)
    denoises = manifest.components[component].role in STEPPING
    axes: dict[str, tuple[int, ...]] = {
        "batch_size": rows_of_denoiser(manifest, target.batch) if denoises else (1, 1, 1),
        "sequence_length": tuple(manifest.text_tokens(each) for each in chosen or (None,) * 3),
        "height": latent_heights,
        "width": latent_widths,
        "latent_height": latent_heights,
        "latent_width": latent_widths,
        "sample_height": heights,
        "sample_width": widths,
    }
    if manifest.wiring.picture_sizes:
        shown = manifest.wiring.picture_sizes
        for i, axis in enumerate(reversed(PICTURE_SIDES)):
            sides = [size[i] // down for size in shown]
            axes[axis] = (min(sides), _middle(shown)[i] // down, max(sides))
    for control in manifest.wiring.controls.values():
        if control.component == component and control.modes:
            axes[PICTURES] = (1, 1, control.modes)
    parts = [halved({"height": axes["height"][i], "width": axes["width"][i]}) for i in range(3)]
    axes |= {name: tuple(part[name] for part in parts) for name in parts[0]}
    for prompt in manifest.wiring.image_prompts.values():
        count = int(manifest.components[prompt.component].outputs[0].shape[1])
        axes[f"{prompt.tokens}_length"] = (count, count, count * _MOST_PROMPTS)
        axes[f"{prompt.tokens}_groups"] = (1, 1, _MOST_PROMPTS)
    for lora in manifest.wiring.lora_inputs.values():
        axes |= {SETS: (1, 1, axes["batch_size"][2]), RANK: (1, lora.rank, lora.rank)}
    name = "-".join("x".join(map(str, size)) for size in dict.fromkeys((sizes[0], sizes[2])))
    if denoises:
        name += f", batch {_range(target.batch)}"
        name += f", {_range(target.tokens)} tokens" if target.tokens else ""
    return _profile(manifest, component, name, axes)


def _step_profile(manifest: Manifest, component: str, target: Target, ranges: list[tuple[Size, Size, Size]]) -> Profile:
    """One for every size: the step is too small for a static plan to pay."""
    down = manifest.latents.downscale
    rows = rows_of_denoiser(manifest, target.batch)
    every = [[size[i] // down for part in ranges for size in part] for i in (0, 1)]
    widths, heights = ((min(sides), sides[0], max(sides)) for sides in every)
    axes: dict[str, tuple[int, ...]] = {
        "batch": (1, 1, rows[2]),  # images without guidance take one row each
        "calls": (1, rows[1], rows[2]),
        "channels": (manifest.latents.channels,) * 3,
        "height": heights,
        "width": widths,
        "registers": _REGISTERS,
        "terms": tuple(count + 3 for count in _REGISTERS),
        "steps": _STEPS,
        "steps_and_end": tuple(count + 1 for count in _STEPS),
    }
    return _profile(manifest, component, f"any of the sizes, 1-{rows[2]} rows", axes)


def _profile(manifest: Manifest, component: str, name: str, axes: Mapping[str, tuple[int, ...]]) -> Profile:
    def shape(axis_of: tuple[int | str, ...], k: int) -> Shape:
        return tuple(axes[axis][k] if isinstance(axis, str) else axis for axis in axis_of)

    inputs = manifest.components[component].inputs
    return Profile(name, {t.name: (shape(t.shape, 0), shape(t.shape, 1), shape(t.shape, 2)) for t in inputs})
