"""`verify`: the hashes of a bundle, then each component against what torch gave when it was compiled."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle import FULL, PRECISIONS, Bundle
from ..bundle.precisions import FULL_SHARE
from ..bundle.reports import read_report
from ..common.arrays import Array
from ..common.checks import MOST_THREADS, whole_number
from ..common.errors import BundleError
from .cache import EngineStore
from .loader import EngineLoader, precisions_of
from .names import ONNXRUNTIME, OPENVINO, EngineName
from .runnable import check_runnable


@dataclass(frozen=True, slots=True)
class Check:
    """One component in one precision: the largest difference to the recorded reference and what was allowed."""

    component: str
    precision: str
    max_abs_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.max_abs_error <= self.allowed


def verify(
    bundle: Bundle, *, engine: str = "onnxruntime", precision: str | None = None, threads: int | None = None
) -> Iterator[Check]:
    """Check every hash, then yield one `Check` a component, precision and shape as it is done.

    engine: one of `names.ENGINES`. precision: default all that the bundle has and the engine runs. What has plans is
    held against ONNX Runtime on the CPU at their own shapes, with the recorded inputs repeated to fill them.
    Raises `BundleError` when a file was changed, or for a bundle without recorded references.
    """
    if bundle.foreign:
        raise BundleError(f"{bundle.root} has no bundle.json and so nothing to verify against: compile it")
    if threads is not None:
        threads = whole_number("threads", threads, 1, MOST_THREADS)
    check_runnable(bundle)
    bundle.check()
    problems = EngineStore(bundle.root / "engines").problems()
    if problems:
        raise BundleError(f"{bundle.root}: {'; '.join(problems)}; then run or compile builds what is needed again")
    for chosen in (precision,) if precision is not None else runnable(bundle, engine):
        yield from _verify(bundle, engine, chosen, threads)


def runnable(bundle: Bundle, engine: str) -> list[str]:
    """The precisions that `bundle` has and `engine` runs: of plans the one it was compiled for.

    ONNX Runtime has no bf16 on the CPU.
    """
    name = EngineName.parse(engine)
    if name.backend not in (ONNXRUNTIME, OPENVINO):
        return [bundle.manifest.precision]
    lower = set(precisions_of(bundle, name)) - {FULL, *(["bf16"] if str(name) == ONNXRUNTIME else [])}
    return [FULL, *sorted(lower)]


def _verify(bundle: Bundle, engine: str, precision: str, threads: int | None) -> Iterator[Check]:
    loader, exact = EngineLoader(bundle, engine, precision), EngineLoader(bundle, ONNXRUNTIME, FULL)
    unrecorded = twins(bundle)
    for name in bundle.manifest.components:
        if name in unrecorded:
            continue
        own = loader.precision_of(name)
        shapes = loader.plan_shapes(name)
        if own != precision and not shapes:  # the step, which is checked with fp32
            continue
        checked = loader.load(name, threads)
        feeds, expected = recorded_case(bundle, name)
        if not shapes:
            yield compare_outputs(name, own, checked(feeds), expected, bundle.component(name).storage)
            continue
        reference = exact.load(name, threads)
        for shape in shapes:
            feeds = {key: np.resize(array, shape[key]) for key, array in feeds.items()}
            yield compare_outputs(name, own, checked(feeds), reference(feeds))


def twins(bundle: Bundle) -> dict[str, str]:
    """The components of which a smaller twin was held against torch, and what that was; nothing of them is recorded."""
    parity = read_report(bundle, "parity")
    found = {name: part.get("twin") for name, part in parity.items() if isinstance(part, dict)}
    files = bundle.manifest.files
    return {name: str(each) for name, each in found.items() if each and f"reports/reference/{name}.npz" not in files}


def _full(bundle: Bundle, name: str) -> str:
    """The memory that holding all of a component against torch takes, in words."""
    variant = bundle.component(name).variant(FULL)
    size = sum(bundle.path(path).stat().st_size for path in (variant.files if variant else ()))
    return f"{size * FULL_SHARE / 2**30:.2g} GiB"


def compare_outputs(
    name: str, precision: str, found: Mapping[str, Array], expected: Mapping[str, Array], storage: str = ""
) -> Check:
    """Hold what component `name` gave in `precision` against what was expected. storage: see `Component`.

    Raises `BundleError` for an output that is not finite or of another shape.
    """
    error, allowed, part = 0.0, float("inf"), max(PRECISIONS[each] for each in (precision, storage) if each)
    for output, reference in expected.items():
        if found[output].shape != reference.shape:
            raise BundleError(f"{name}: output {output!r} is not of the recorded shape; compile the bundle again")
        difference = float(np.abs(found[output] - reference).max())
        if not np.isfinite(difference):
            raise BundleError(f"{name}: output {output!r} is not finite; compile the bundle again on this machine")
        error = max(error, difference)
        allowed = min(allowed, part * max(1.0, float(np.abs(reference).max())))
    return Check(name, precision, error, allowed)


def recorded_case(bundle: Bundle, name: str) -> tuple[dict[str, Array], dict[str, Array]]:
    """The inputs and outputs of component `name` that were recorded in torch.

    Raises `BundleError` where they do not cover all its outputs with finite numbers.
    """
    outputs = {tensor.name for tensor in bundle.component(name).outputs}
    relative = f"reports/reference/{name}.npz"
    if relative not in bundle.manifest.files and name in twins(bundle):
        raise BundleError(
            f"{bundle.root}: of the {name} a twin alone was held against torch, and nothing is recorded to hold this "
            f"against: compile the checkpoint again with --validate full, which takes about {_full(bundle, name)} of "
            "memory, here or on a machine that has it"
        )
    if relative not in bundle.manifest.files:
        raise BundleError(f"{bundle.root}: the manifest has no hash for {relative}; compile the bundle again")
    path = bundle.path(relative)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, MemoryError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path} cannot be read ({error}); compile the bundle again") from None
    feeds = {key.removeprefix("in."): value for key, value in arrays.items() if key.startswith("in.")}
    expected = {key.removeprefix("out."): value for key, value in arrays.items() if key.startswith("out.")}
    numbers = all(value.dtype.kind in "fi" and np.isfinite(value).all() for value in expected.values())
    if set(expected) != outputs or not numbers:
        raise BundleError(f"{path} does not hold every output of {name}; compile the bundle again")
    return feeds, expected


def save_case(path: Path, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
    """Write the inputs and outputs of a component, for `recorded_case` to read."""
    arrays = {f"in.{name}": array for name, array in feeds.items()} | {f"out.{n}": a for n, a in outputs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it may be linked to a finished bundle's, which must not change
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
