"""The arithmetic of each form in which a change of a weight is published. All in float32.

A change is evaluated against the weight W of the checkpoint and a strength s. Δ below is what the form adds at strength
1, with its scale `alpha / rank` (`alpha / √rank` where that is stabilised), which is 1 where no alpha is given.

    lora    Δ = up · down              Hu et al. 2021; with `mid` in between for convolutions (Tucker)
    loha    Δ = (a₁ b₁) ⊙ (a₂ b₂)      Hyeon-Woo et al. 2021
    lokr    Δ = w₁ ⊗ w₂                Edalati et al. 2022; each may be a product of two
    glora   Δ = W a₁ a₂ + b₁ b₂        Chavan et al. 2023
    ia3     Δ = W ⊙ v                  Liu et al. 2022; v along the outputs, or the inputs
    oft     Δ = (R − 1) W              Qiu et al. 2023; R of blocks on the diagonal, by Cayley's transform
    boft    Δ = R₁ R₂ … W − W          Liu et al. 2023; each factor drawn to the identity by s
    full    Δ = diff

With a magnitude m (DoRA, Liu et al. 2024) the weight becomes m · (W + sΔ) / ‖W + sΔ‖, as PEFT has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...common.arrays import Array
from ...common.errors import LoraError

Parts = Mapping[str, Array]

_NEEDED = {
    "lora": {"up", "down"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "lokr": set[str](),
    "glora": {"a1", "a2", "b1", "b2"},
    "ia3": {"ia3", "on_input"},
    "oft": {"oft_blocks"},
    "full": {"diff"},
}
_MARKS = {
    "up": "lora",
    "down": "lora",
    "mid": "lora",
    "hada": "loha",
    "lokr": "lokr",
    "a1": "glora",
    "a2": "glora",
    "b1": "glora",
    "b2": "glora",
    "bm": "glora",
    "ia3": "ia3",
    "on_input": "ia3",
    "oft": "oft",
    "diff": "full",
}
"""Which form a part belongs to, by its name up to the first underscore or by all of it."""
LAZY = ("down", "up")
"""Parts that are made float32 where they are used, so that a large file is not held twice."""
_MATRICES = frozenset(
    {
        *("up", "down", "mid", "a1", "a2", "b1", "b2", "bm"),
        *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")),
    }
)
"""Parts that have two axes at least."""
_BESIDE = frozenset({"alpha", "dora_scale", "rescale"})


@dataclass(frozen=True, slots=True)
class Change:
    """How a file changes one weight of the checkpoint.

    form: a key of the table above. parts: its tensors, float32. scale: of Δ. shape: of the weight.
    """

    form: str
    parts: Parts = field(repr=False)
    scale: float
    shape: tuple[int, ...]

    @classmethod
    def of(cls, parts: Parts, shape: tuple[int, ...], scale: Callable[[int], float] | None = None) -> Change:
        """parts: of one weight. scale: of a rank, where the file says it elsewhere than beside the parts.

        Raises `LoraError`, which says what is wrong, for parts that are not of one form or do not fit the weight.
        """
        forms = {_MARKS.get(name) or _MARKS.get(name.split("_")[0], "") for name in parts.keys() - _BESIDE}
        if len(forms) != 1 or "" in forms:
            raise LoraError(f"parts of no one form ({', '.join(sorted(parts))})")
        [form] = forms
        flat = [name for name, each in parts.items() if each.ndim < 2 and name in _MATRICES]
        if flat or any(not each.size for each in parts.values()):
            raise LoraError(f"no matrix in {', '.join(flat) or 'it'}")
        if "alpha" in parts and parts["alpha"].size != 1:
            raise LoraError(f"an alpha of {parts['alpha'].size} numbers")
        missing = _NEEDED[form] - parts.keys()
        if missing:
            raise LoraError(f"no {', '.join(sorted(missing))}")
        rank = _rank(form, parts)
        alpha = float(parts["alpha"].reshape(-1)[0]) if "alpha" in parts else 0.0
        whole = {"lokr_w1", "lokr_w2"} <= parts.keys()  # where alpha has no say
        if form in ("oft", "ia3", "full") or whole:
            factor = 1.0
        elif scale is not None and "alpha" not in parts:
            factor = scale(rank)
        else:
            factor = alpha / rank if alpha else 1.0
        change = cls(form, parts, factor, shape)
        change._check()
        if change.low_rank and "mid" not in parts:
            return change
        return cls(form, {name: each.astype(np.float32, copy=False) for name, each in parts.items()}, factor, shape)

    @property
    def low_rank(self) -> bool:
        """Whether it is a product of two factors that does not ask for the weight."""
        return self.form == "lora" and "dora_scale" not in self.parts

    def factors(self, strength: float) -> tuple[Array, Array]:
        """Of a low-rank form: down (rank, in, …), in the type that it is stored in, and up (out, rank), in float32.

        Their product is what it adds at this strength.
        """
        down, up = self.parts["down"], self.parts["up"].reshape(self.shape[0], -1)
        if "mid" in self.parts:
            down = _einsum("mn...,ni->mi...", self.parts["mid"], down.reshape(len(down), -1))
        return down.reshape(len(down), *self.shape[1:]), up.astype(np.float32) * np.float32(self.scale * strength)

    def nearest(self, weight: Array, strength: float, rank: int) -> tuple[Array, Array, float]:
        """Factors of this rank whose product is nearest to what is added, as `factors` has them, and the share lost.

        By a random sketch (Halko et al. 2011, algorithms 4.4 and 5.1). The share is of the Frobenius norm.
        """
        whole = np.ascontiguousarray(self.added(weight, strength)).reshape(self.shape[0], -1)
        rank = min(rank, *whole.shape)
        sketch = np.random.default_rng(0).standard_normal((whole.shape[1], min(rank + 8, whole.shape[1])))
        base = whole @ sketch.astype(np.float32)
        for _ in range(2):
            base = whole @ (whole.T @ np.linalg.qr(base)[0])
        base = np.linalg.qr(base)[0]
        left, sizes, right = np.linalg.svd(base.T @ whole, full_matrices=False)
        up, down = (base @ left[:, :rank]) * sizes[:rank], right[:rank]
        size = float(np.linalg.norm(whole)) or 1.0
        return down.reshape(rank, *self.shape[1:]), up, float(np.linalg.norm(whole - up @ down)) / size

    def added(self, weight: Array, strength: float) -> Array:
        """What is added to `weight`, float32 of its shape, at this strength."""
        if self.form == "oft" and self.parts["oft_blocks"].ndim == 4:
            return self._boft(weight, strength) - weight
        if self.low_rank:
            return self._product(weight, strength)
        delta = self._delta(weight).reshape(self.shape)
        delta = delta * np.float32(strength * self.scale)
        return self._decomposed(weight, delta) - weight if "dora_scale" in self.parts else delta

    def _product(self, weight: Array, strength: float) -> Array:
        """up · down, laid out in memory as the weight is."""
        down, up = self.factors(strength)
        down = down.reshape(len(down), -1).astype(np.float32, copy=False)
        if weight.ndim == 2 and weight.flags.f_contiguous and not weight.flags.c_contiguous:
            transposed: Array = np.matmul(down.T, up.T).T
            return transposed
        return np.asarray(np.matmul(up, down)).reshape(self.shape)

    def _delta(self, weight: Array) -> Array:
        """Δ without its scale."""
        p = self.parts
        if self.form == "lora":
            if "mid" in p:
                return _einsum("mn...,im,nj->ij...", p["mid"], _matrix(p["up"]), _matrix(p["down"]))
            return np.asarray(_matrix(p["up"]) @ _matrix(p["down"]))
        if self.form == "loha":
            return _hadamard(p, 1) * _hadamard(p, 2)
        if self.form == "lokr":
            first, second = _kronecker_part(p, 1), _kronecker_part(p, 2)
            return np.kron(first.reshape(first.shape + (1,) * (second.ndim - first.ndim)), second)
        if self.form == "glora":
            a = _matrix(p["a1"]) @ _matrix(p["a2"])
            if "bm" in p:
                b = _einsum("mn...,im,nj->ij...", p["bm"], _matrix(p["b1"]), _matrix(p["b2"]))
            else:
                b = _matrix(p["b1"]) @ _matrix(p["b2"])
            return _einsum("oi...,ij->oj...", weight, a) + b.reshape(weight.shape)
        if self.form == "ia3":
            along = 1 if p["on_input"].reshape(-1)[0] else 0
            return weight * p["ia3"].reshape([-1 if axis == along else 1 for axis in range(weight.ndim)])
        if self.form == "oft":
            return self._oft(weight)
        return p["diff"]

    def _rotations(self) -> Array:
        """Orthogonal matrices, (…, b, b), of skew-symmetric ones."""
        blocks = self.parts["oft_blocks"]
        skew = blocks - blocks.swapaxes(-1, -2)
        alpha = float(self.parts["alpha"].reshape(-1)[0]) if "alpha" in self.parts else 0.0
        limit = alpha * self.shape[0]
        norm = float(np.linalg.norm(skew)) + 1e-8
        if 0 < limit < norm:
            skew = skew * np.float32(limit / norm)
        one = np.eye(blocks.shape[-1], dtype=np.float32)
        return np.asarray((one + skew) @ np.linalg.inv(one - skew))

    def _oft(self, weight: Array) -> Array:
        turned = self._rotations()
        count, size = turned.shape[0], turned.shape[-1]
        rows = weight.reshape(count, size, -1)
        made = _einsum("knm,kni->kmi", turned - np.eye(size, dtype=np.float32), rows).reshape(weight.shape)
        rescale = self._rescale()
        return made if rescale is None else rescale * made + (rescale - 1) * weight

    def _boft(self, weight: Array, strength: float) -> Array:
        turned = self._rotations()
        stages, _, size, _ = turned.shape
        one, flat = np.eye(size, dtype=np.float32), weight.reshape(len(weight), -1)
        for i in range(stages):
            blocks = turned[i] * np.float32(strength) + np.float32(1 - strength) * one
            stride = 2**i * (size // 2)
            mixed = flat.reshape(-1, 2, stride, flat.shape[1]).swapaxes(1, 2).reshape(-1, size, flat.shape[1])
            mixed = _einsum("bij,bjc->bic", blocks, mixed)
            flat = mixed.reshape(-1, stride, 2, flat.shape[1]).swapaxes(1, 2).reshape(len(weight), -1)
        made = flat.reshape(weight.shape)
        rescale = self._rescale()
        return made if rescale is None else made * rescale

    def _rescale(self) -> Array | None:
        found = self.parts.get("rescale")
        return None if found is None else found.reshape(-1, *[1] * (len(self.shape) - 1))

    def _decomposed(self, weight: Array, delta: Array) -> Array:
        """m · (W + Δ) / ‖W + Δ‖, the norm of each output, or of each input where m says so."""
        whole, magnitude = weight + delta, self.parts["dora_scale"]
        kept = 1 if magnitude.ndim > 1 and magnitude.shape[0] == 1 < magnitude.shape[1] else 0
        others = tuple(axis for axis in range(whole.ndim) if axis != kept)
        norm = np.sqrt(np.square(whole).sum(axis=others, keepdims=True))
        made: Array = whole * (magnitude.reshape([-1 if axis == kept else 1 for axis in range(whole.ndim)]) / norm)
        return made

    def _takes(self, magnitude: tuple[int, ...]) -> bool:
        """Whether a magnitude of this shape is one of the outputs or of the inputs."""
        if len(self.shape) < 2:
            return False
        outputs, inputs = self.shape[:2]
        size = math.prod(magnitude)
        of_inputs = len(magnitude) > 1 and magnitude[0] == 1 < magnitude[1]
        return size == inputs == magnitude[1] if of_inputs else size == outputs == magnitude[0]

    def _check(self) -> None:
        """Raise `LoraError` for parts that do not fit the weight."""
        empty = np.broadcast_to(np.zeros((), np.float32), self.shape)
        try:
            if self.form == "oft":
                count, square = math.prod(self.parts["oft_blocks"].shape[-3:-1]), self.parts["oft_blocks"].shape[-2:]
                odd = self.parts["oft_blocks"].ndim == 4 and square[0] % 2
                if square[0] != square[1] or odd:
                    raise ValueError(f"blocks of {square}")
                if count != self.shape[0] or self.parts["oft_blocks"].ndim not in (3, 4):
                    raise ValueError(f"blocks of {count} outputs")
                rescale = self._rescale()
                if rescale is not None and len(rescale) not in (1, self.shape[0]):
                    raise ValueError(f"{len(rescale)} factors")
                if self.parts["oft_blocks"].ndim == 4:
                    self._boft(np.zeros((self.shape[0], *[1] * (len(self.shape) - 1)), np.float32), 1.0)
                return
            found = _shape_of(self.form, self.parts, empty)
            if math.prod(found) != math.prod(self.shape) or found[0] != self.shape[0]:
                raise ValueError(f"{found}")
            if "dora_scale" in self.parts and not self._takes(self.parts["dora_scale"].shape):
                raise ValueError(f"a magnitude of {self.parts['dora_scale'].shape}")
        except (ValueError, IndexError, TypeError, np.linalg.LinAlgError) as error:
            raise LoraError(f"parts for another shape than {self.shape} ({error})") from None


def _shape_of(form: str, parts: Parts, weight: Array) -> tuple[int, ...]:
    """The shape of what a form makes. Raises `ValueError` where its parts do not fit each other."""

    def product(a: Array, b: Array) -> tuple[int, ...]:
        first, second = _matrix(a), _matrix(b)
        if first.shape[1] != second.shape[0]:
            raise ValueError(f"{a.shape} times {b.shape}")
        return first.shape[0], second.shape[1]

    if form == "lora":
        if "mid" not in parts:
            return product(parts["up"], parts["down"])
        m, n, *kernel = parts["mid"].shape
        up, down = _matrix(parts["up"]), _matrix(parts["down"])
        if up.shape[1] != m or len(down) != n:
            raise ValueError(f"{parts['up'].shape}, {parts['mid'].shape} and {parts['down'].shape}")
        return (len(up), down.shape[1], *kernel)
    if form == "loha":
        shapes = {_hadamard_shape(parts, i) for i in (1, 2)}
        if len(shapes) != 1:
            raise ValueError(" and ".join(map(str, shapes)))
        return shapes.pop()
    if form == "lokr":
        first, second = _kronecker_shape(parts, 1), _kronecker_shape(parts, 2)
        return (first[0] * second[0], first[1] * second[1], *second[2:])
    if form == "glora":
        inner = product(parts["a1"], parts["a2"])
        if inner != (weight.shape[1], weight.shape[1]):
            raise ValueError(f"{inner} behind {weight.shape}")
        if "bm" in parts:
            if parts["bm"].shape[:2] != (_matrix(parts["b1"]).shape[1], len(parts["b2"])):
                raise ValueError(f"{parts['b1'].shape}, {parts['bm'].shape} and {parts['b2'].shape}")
            return (len(_matrix(parts["b1"])), _matrix(parts["b2"]).shape[1], *parts["bm"].shape[2:])
        return product(parts["b1"], parts["b2"])
    if form == "ia3":
        along = 1 if parts["on_input"].reshape(-1)[0] else 0
        if parts["ia3"].size != weight.shape[along]:
            raise ValueError(f"{parts['ia3'].size} factors")
        return weight.shape
    return parts["diff"].shape


def _rank(form: str, parts: Parts) -> int:
    if form == "lora":
        return len(parts["down"])
    if form == "loha":
        return len(parts["hada_w1_b"])
    if form == "glora":
        return len(_matrix(parts["a2"]))
    if form == "lokr":
        for name in ("lokr_w2_b", "lokr_w1_b"):
            if name in parts:
                return len(parts[name])
    return 1


def _einsum(how: str, *arrays: Array) -> Array:
    return np.asarray(np.einsum(how, *arrays))


def _matrix(array: Array) -> Array:
    return array.reshape(len(array), -1)


def _hadamard(parts: Parts, i: int) -> Array:
    a, b, core = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")
    if core is not None:
        return _einsum("ij...,jr,ip->pr...", core, b, a)
    return np.asarray(_matrix(a) @ _matrix(b))


def _hadamard_shape(parts: Parts, i: int) -> tuple[int, ...]:
    a, b, core = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")
    if core is None:
        if _matrix(a).shape[1] != len(b):
            raise ValueError(f"{a.shape} times {b.shape}")
        return len(a), _matrix(b).shape[1]
    if core.shape[:2] != (len(a), len(b)) or a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{a.shape}, {core.shape} and {b.shape}")
    return (a.shape[1], b.shape[1], *core.shape[2:])


def _kronecker_shape(parts: Parts, i: int) -> tuple[int, ...]:
    """Of `_kronecker_part`, which is not made. Raises `ValueError` where its parts do not fit."""
    whole, a, b, core = (parts.get(f"lokr_{name}") for name in (f"w{i}", f"w{i}_a", f"w{i}_b", f"t{i}"))
    if whole is not None:
        return whole.shape
    if a is None or b is None:
        raise ValueError(f"no lokr_w{i}")
    if core is not None:
        if core.shape[:2] != (len(a), len(b)) or a.ndim != 2 or b.ndim != 2:
            raise ValueError(f"{a.shape}, {core.shape} and {b.shape}")
        return (a.shape[1], b.shape[1], *core.shape[2:])
    if _matrix(a).shape[1] != len(b):
        raise ValueError(f"{a.shape} times {b.shape}")
    return (len(a), *b.shape[1:])


def _kronecker_part(parts: Parts, i: int) -> Array:
    """w₁ or w₂: whole, or the product of two, around a core where there is one. Raises `ValueError` where it lacks."""
    whole, a, b, core = (parts.get(f"lokr_{name}") for name in (f"w{i}", f"w{i}_a", f"w{i}_b", f"t{i}"))
    if whole is not None:
        return whole
    if a is None or b is None:
        raise ValueError(f"no lokr_w{i}")
    if core is not None:
        return _einsum("ij...,ip,jr->pr...", core, a, b)
    return np.asarray(_matrix(a) @ _matrix(b)).reshape(len(a), *b.shape[1:])
