"""The small rendered world that pico draws: one shape of one colour at one place on one background.

Because every picture is rendered from a `Scene`, a scorer can tell which attributes a generated
picture has: see `scorer.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Width and height of a picture, in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "heart")
COLORS = {
    "red": (226, 38, 44),
    "orange": (250, 140, 20),
    "yellow": (252, 228, 60),
    "green": (50, 200, 70),
    "cyan": (70, 215, 230),
    "blue": (62, 110, 250),
    "purple": (170, 70, 220),
    "white": (255, 255, 255),
}
BACKGROUNDS = {
    "black": (12, 12, 14),
    "navy": (16, 24, 92),
    "maroon": (92, 14, 34),
    "forest": (14, 72, 44),
    "gray": (120, 124, 130),
    "beige": (222, 204, 170),
}
PLACES = {
    "at the left": (-13, 0),
    "at the right": (13, 0),
    "at the top": (0, -13),
    "at the bottom": (0, 13),
    "in the center": (0, 0),
}
SIZES = {"small": 9.0, "large": 16.0}
NEW_SHAPES, TWICE = ("moon",), "twice"
"""A shape and a place that the world has not, and that LoRAs bring: see `lora`."""
_APART = 15.0
"""How far each of two shapes is from the middle, in pixels."""
_SUPERSAMPLING = 4
_FURTHEST = 1.12
"""The furthest that a shape reaches from its centre, in radii."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a picture shows. `str(scene)` is its caption."""

    size: str
    color: str
    shape: str
    place: str
    background: str

    def __str__(self) -> str:
        return caption(self)


ATTRIBUTES = tuple(field.name for field in fields(Scene))


def all_scenes() -> list[Scene]:
    """Every scene of the world (3,840 of them), in a fixed order."""
    return [Scene(*values) for values in itertools.product(SIZES, COLORS, SHAPES, PLACES, BACKGROUNDS)]


def split_scenes(held_out: int = 200) -> tuple[list[Scene], list[Scene]]:
    """Training scenes and `held_out` scenes that no training picture or caption shows."""
    scenes = all_scenes()
    order = np.random.default_rng(2024).permutation(len(scenes))
    shuffled = [scenes[i] for i in order]
    return shuffled[held_out:], shuffled[:held_out]


def caption(scene: Scene, parts: frozenset[str] = frozenset(ATTRIBUTES)) -> str:
    """The caption of `scene`, naming the attributes in `parts` (the shape is always named)."""
    words = [getattr(scene, name) for name in ("size", "color") if name in parts] + [scene.shape]
    text = f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"
    if "place" in parts:
        text += f" {scene.place}"
    if "background" in parts:
        text += f" on a {scene.background} background"
    return text


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption as training sees it: usually whole, sometimes with attributes left out."""
    if rng.random() < 0.8:
        return caption(scene)
    return caption(scene, frozenset(name for name in ATTRIBUTES if rng.random() < 0.6))


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The polygon of `shape` around (x, y) with outer radius r."""

    def polar(angles_radii: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x + r * k * math.sin(a), y - r * k * math.cos(a)) for a, k in angles_radii]

    if shape in ("circle", "ring"):
        return polar([(2 * math.pi * i / 96, 1.0) for i in range(96)])
    if shape == "square":
        return [(x + sx * 0.86 * r, y + sy * 0.86 * r) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)]
    if shape == "star":
        return polar([(math.pi * i / 5, 1.12 if i % 2 == 0 else 0.45) for i in range(10)])
    if shape == "diamond":
        return [(x, y - 1.1 * r), (x + 0.8 * r, y), (x, y + 1.1 * r), (x - 0.8 * r, y)]
    if shape == "cross":
        a, b = 0.34 * r, r
        corners = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
        return [(x + dx, y + dy) for dx, dy in corners]
    if shape == "heart":
        points = []
        for i in range(96):
            t = 2 * math.pi * i / 96
            dx = 16 * math.sin(t) ** 3
            dy = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((x + dx * r / 16.5, y - (dy + 2) * r / 15.5))
        return points
    if shape == "moon":
        outer = [(0.1 + math.cos(a), math.sin(a)) for a in (0.66 + (2 * math.pi - 1.32) * i / 64 for i in range(65))]
        inner = [(0.92 + 0.78 * math.cos(a), 0.78 * math.sin(a)) for a in (4.16 - 2.04 * i / 48 for i in range(49))]
        return [(x + px * r, y + py * r) for px, py in (*outer, *inner)]
    raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")


def coverage(shape: str, x: float, y: float, r: float, side: int = SIDE) -> np.ndarray:
    """How much of each pixel the shape covers, float32 in [0, 1], of shape (side, side)."""
    k = _SUPERSAMPLING
    mask = Image.new("L", (side * k, side * k), 0)
    draw = ImageDraw.Draw(mask)
    draw.polygon([(px * k, py * k) for px, py in _outline(shape, x, y, r)], fill=255)
    if shape == "ring":
        draw.polygon([(px * k, py * k) for px, py in _outline(shape, x, y, 0.55 * r)], fill=0)
    pixels = np.asarray(mask, np.float32).reshape(side, k, side, k)
    return np.asarray(pixels.mean(axis=(1, 3)) / 255.0, np.float32)


@dataclass(frozen=True, slots=True)
class Pose:
    """Where a shape lies in a picture: its centre and its outer radius, in pixels."""

    x: float
    y: float
    radius: float


def pose(scene: Scene, rng: np.random.Generator | None = None) -> Pose:
    """Where `scene` has its shape; `rng` moves and resizes it a little."""
    dx, dy = (0.0, 0.0) if scene.place == TWICE else (float(offset) for offset in PLACES[scene.place])
    radius = SIZES[scene.size]
    if rng is not None:
        dx, dy = dx + rng.uniform(-1.5, 1.5), dy + rng.uniform(-1.5, 1.5)
        radius *= rng.uniform(0.94, 1.06)
    return Pose(SIDE / 2 + dx, SIDE / 2 + dy, radius)


def free_pose(rng: np.random.Generator) -> Pose:
    """A shape of any size of the world and between, wherever it fits in the picture."""
    radius = rng.uniform(0.94 * min(SIZES.values()), 1.06 * max(SIZES.values()))
    reach = SIDE / 2 - 1 - _FURTHEST * radius
    x, y = SIDE / 2 + rng.uniform(-reach, reach, 2)
    return Pose(float(x), float(y), float(radius))


def mask_of(scene: Scene, at: Pose) -> np.ndarray:
    """The `coverage` of the shape of `scene` at a pose; of two shapes, on both sides of it."""
    if scene.place == TWICE:
        both = [coverage(scene.shape, at.x + side * _APART, at.y, at.radius) for side in (-1, 1)]
        return np.asarray(np.maximum(*both))
    return coverage(scene.shape, at.x, at.y, at.radius)


def paint(scene: Scene, mask: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """The colours of `scene` over a `coverage`, as uint8 RGB of shape (64, 64, 3); `rng` tints them a little."""
    foreground: np.ndarray = np.array(COLORS[scene.color], np.float64)
    background: np.ndarray = np.array(BACKGROUNDS[scene.background], np.float64)
    if rng is not None:
        foreground = foreground + rng.uniform(-8, 8, 3)
        background = background + rng.uniform(-6, 6, 3)
    mask = mask[..., None]
    return np.asarray((background * (1 - mask) + foreground * mask).round().clip(0, 255), np.uint8)


def render(scene: Scene, rng: np.random.Generator | None = None) -> np.ndarray:
    """Draw `scene` as uint8 RGB of shape (64, 64, 3); `rng` moves, resizes and tints it a little."""
    return paint(scene, mask_of(scene, pose(scene, rng)), rng)


def outline(mask: np.ndarray) -> np.ndarray:
    """The edge of what a `coverage` covers by more than half, white on black: uint8 RGB of shape (64, 64, 3).

    It is two pixels thick: those inside that touch the outside, and those outside that touch the inside.
    """
    inside = np.pad(mask > 0.5, 1, mode="edge")
    crosses = [inside[1:-1, 1:-1], inside[:-2, 1:-1], inside[2:, 1:-1], inside[1:-1, :-2], inside[1:-1, 2:]]
    edge = np.any(crosses, axis=0) & ~np.all(crosses, axis=0)
    return np.repeat(np.where(edge, np.uint8(255), np.uint8(0))[..., None], 3, axis=2)
