"""What TensorRT plans are built for: architectures, shapes, batch, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...bundle import Manifest
from ...common.checks import LARGEST_SIDE, MOST_IMAGES, is_whole
from ...common.errors import DiffoundryError
from ..profiles import Profile, Shape
from .plan import FLAGS

Size = tuple[int, int]
"""Width and height, in pixels."""

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_BATCH = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
_MOST_PROMPTS = 8
"""Prompts that a plan of a text encoder takes at once, at least."""
_REGISTERS = 1, 2, 8
"""Latents that a sampler keeps between its steps."""
_STEPS = 1, 20, 1000


@dataclass(frozen=True, slots=True)
class Target:
    """archs: GPU architectures, as `sm89`; empty for the GPU that is here. sizes: of pictures, one static plan each
    (empty: the checkpoint's own). dynamic: the smallest and largest size of one plan that takes all between them.
    batch: the fewest and most images of a call. flags: of `engines.tensorrt.plan.FLAGS`.
    memory_limit: bytes that the builder may take.
    """

    archs: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    dynamic: tuple[Size, Size] | None = None
    batch: tuple[int, int] = (1, 1)
    flags: tuple[str, ...] = ()
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("archs", "flags"):
            if not _is_tuple(getattr(self, name), str):
                raise DiffoundryError(f"{name} must be a tuple of names, found {getattr(self, name)!r:.80}")
        unknown = [flag for flag in self.flags if flag not in FLAGS]
        if unknown:
            raise DiffoundryError(f"unknown flag {unknown[0]!r} of a plan: choose from {', '.join(FLAGS)}")
        for size in self.sizes if isinstance(self.sizes, (tuple, list)) else (self.sizes,):
            _check_size(size)
        self._check_dynamic()
        if not _is_pair(self.batch):
            raise DiffoundryError(f"batch must be the fewest and the most images, found {self.batch!r:.80}")
        low, high = self.batch
        if not 1 <= low <= high <= MOST_IMAGES:
            raise DiffoundryError(
                f"the batch must be from 1 to {MOST_IMAGES} images, the smaller number first, found {low}-{high}"
            )
        limit = self.memory_limit
        if limit is not None and not (is_whole(limit) and limit > 0):
            raise DiffoundryError(f"the memory of the builder must be a number of bytes above 0, found {limit!r:.80}")

    def _check_dynamic(self) -> None:
        if self.dynamic is None:
            return
        if not isinstance(self.dynamic, (tuple, list)) or len(self.dynamic) != 2:
            raise DiffoundryError(f"dynamic must be the smallest and the largest size, found {self.dynamic!r:.80}")
        for size in self.dynamic:
            _check_size(size)
        if any(low > high for low, high in zip(*self.dynamic, strict=True)):
            raise DiffoundryError("the dynamic sizes must be given as MIN-MAX, such as 256x256-1024x1024")

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
            if side < unit or side % unit or side > LARGEST_SIDE:
                raise DiffoundryError(
                    f"the sides of a shape must be multiples of {unit} from {unit} to {LARGEST_SIDE}, found {side}"
                )
        return ranges


def _is_tuple(value: object, kind: type) -> bool:
    return isinstance(value, (tuple, list)) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _is_pair(value: object) -> bool:
    return _is_tuple(value, int) and len(value) == 2  # type: ignore[arg-type]


def _check_size(size: object) -> None:
    if not _is_pair(size):
        raise DiffoundryError(f"a size must be a width and a height, such as (512, 768), found {size!r:.80}")


def parse_size(text: str) -> Size:
    """Read `512x768`, width and height. Raises `DiffoundryError`."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise DiffoundryError(f"a shape is WIDTHxHEIGHT, such as 512x768, found {text!r}")
    return int(found[1]), int(found[2])


def parse_range(text: str) -> tuple[Size, Size]:
    """Read `256x256-1024x1024`. Raises `DiffoundryError`."""
    low, dash, high = text.partition("-")
    if not dash:
        raise DiffoundryError(f"dynamic sizes are MIN-MAX, such as 256x256-1024x1024, found {text!r}")
    return parse_size(low), parse_size(high)


def parse_batch(text: str) -> tuple[int, int]:
    """Read `4` or `1-4`. Raises `DiffoundryError`."""
    found = _BATCH.fullmatch(text.strip())
    if found is None:
        raise DiffoundryError(f"a batch is a number or a range, such as 4 or 1-4, found {text!r}")
    return int(found[1]), int(found[2] or found[1])


def profiles(manifest: Manifest, component: str, target: Target) -> list[Profile]:
    """The profiles that `component` is built for: one a size, or one in all where the size does not matter to it."""
    ranges = target.all_sizes(manifest)
    role = manifest.components[component].role
    if role == "text":
        encoder = next(each for each in manifest.wiring.text if each.component == component)
        tokens = manifest.tokenizers[encoder.tokenizer].max_length
        rows = max(_MOST_PROMPTS, 2 * target.batch[1])
        axes = {"batch_size": (1, 2, rows), "sequence_length": (tokens,) * 3}
        return [_profile(manifest, component, f"{tokens} tokens, 1-{rows} prompts", axes)]
    if role == "step":
        return [_step_profile(manifest, component, target, ranges)]
    return [_sized_profile(manifest, component, target, sizes) for sizes in ranges]


def rows_of_denoiser(manifest: Manifest, batch: tuple[int, int]) -> tuple[int, int, int]:
    """The least, usual and largest number of rows of a call: two an image where it is guided."""
    given = any(source.startswith("guidance") for source in manifest.wiring.inputs.values())
    halves = 2 if manifest.default_guidance > 1 and not given else 1
    low, high = batch
    return (halves * low,) * 3 if low == high else (low, halves * low, halves * high)


def _sized_profile(manifest: Manifest, component: str, target: Target, sizes: tuple[Size, Size, Size]) -> Profile:
    down = manifest.latents.downscale
    widths, heights = (tuple(size[i] for size in sizes) for i in (0, 1))
    latent_widths, latent_heights = (tuple(side // down for side in sides) for sides in (widths, heights))
    tokens = next(iter(manifest.tokenizers.values())).max_length
    denoises = manifest.components[component].role == "denoiser"
    axes: dict[str, tuple[int, ...]] = {
        "batch_size": rows_of_denoiser(manifest, target.batch) if denoises else (1, 1, 1),
        "sequence_length": (tokens,) * 3,
        "height": latent_heights,
        "width": latent_widths,
        "latent_height": latent_heights,
        "latent_width": latent_widths,
        "sample_height": heights,
        "sample_width": widths,
    }
    name = "-".join("x".join(map(str, size)) for size in dict.fromkeys((sizes[0], sizes[2])))
    if denoises:
        name += f", batch {_shown(target.batch)}"
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


def _shown(batch: tuple[int, int]) -> str:
    return "-".join(map(str, dict.fromkeys(batch)))


def _profile(manifest: Manifest, component: str, name: str, axes: Mapping[str, tuple[int, ...]]) -> Profile:
    def shape(axis_of: tuple[int | str, ...], k: int) -> Shape:
        return tuple(axes[axis][k] if isinstance(axis, str) else axis for axis in axis_of)

    inputs = manifest.components[component].inputs
    return Profile(name, {t.name: (shape(t.shape, 0), shape(t.shape, 1), shape(t.shape, 2)) for t in inputs})
