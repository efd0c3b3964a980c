"""The run in float32 that eight bits are held against: images, calls of the denoiser and its statistics.

It is kept prompt by prompt, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np

from ...bundle import Bundle
from ...common.arrays import Array
from ...common.errors import DiffoundryError
from ...common.files import replacing
from ...common.progress import Progress
from ..graph import read_blocked
from ..scan import Scan, run_loop
from ..sessions import RecordedEngine, Recorder, start
from .attention import Attention
from .layers import Group
from .statistics import OTHERS, Observer, Statistics

Call = tuple[dict[str, Array], dict[str, Array]]
"""Feeds and outputs."""
_CALLS = 4
"""Calls that are kept of each prompt, of those that statistics do not choose scales by."""
_MOST_CALLS = 4096
_FEED, _OUT, _IMAGE = "feed.", "out.", "image"


@dataclass(frozen=True, slots=True)
class Reference:
    """images: uint8 (H, W, 3), one a prompt. calls: of the denoiser, some of each prompt."""

    images: list[Array]
    calls: list[list[Call]]
    statistics: Statistics

    def sample(self, most: int) -> list[Call]:
        """Up to `most` calls, spread over prompts and steps."""
        ranked = [call for place in zip_longest(*self.calls) for call in place if call is not None]
        if len(ranked) <= most:
            return ranked
        if most == 1:
            return [ranked[len(ranked) // 2]]
        places = sorted({round(i * (len(ranked) - 1) / max(most - 1, 1)) for i in range(most)})
        return [ranked[place] for place in places]


def observe(
    bundle: Bundle,
    name: str,
    groups: Sequence[Group],
    attentions: Sequence[Attention],
    scan: Scan,
    folder: Path,
    model: str,
    given: Statistics | None,
    progress: Progress,
) -> Reference:
    """Run the loop on each prompt that `folder` has nothing of, and return what is there of all.

    name: of the denoiser, whose model has the hash `model`. given: statistics to take, None to gather them.
    Raises `DiffoundryError` for a value that is not finite.
    """
    path = bundle.path(f"{name}/model.onnx")
    timestep = next((key for key, source in bundle.manifest.wiring.inputs.items() if source.startswith("timestep")), "")
    observer = Observer(path, name, groups, attentions, model, timestep)
    gathered = Statistics.empty(model, [group.value for group in groups])
    images, calls = [], []
    for i, prompt in enumerate(scan.prompts):
        part, counted = folder / f"part-{i}.npz", folder / f"statistics-{i}.npz"
        found = _read(part)
        if found is None or (given is None and not counted.is_file()):
            recorder = Recorder(_MOST_CALLS)
            engine: Callable[[], RecordedEngine] = partial(_recorded, path, name, recorder)
            if given is None:
                engine = partial(observer.engine, recorder.add)
            one = replace(scan, prompts=(prompt,), seed=scan.seed + i)

            def told(text: str, done: float, total: int, i: int = i) -> None:
                progress(f"{text} of prompt {i + 1}/{len(scan.prompts)}, step", done, total)

            image = run_loop(bundle, {name: engine}, one, "reference", told)[0]
            if given is None:
                observer.restart().save(counted)
            found = image, _some(recorder.kept)
            _write(part, *found)
        images.append(found[0])
        calls.append(found[1])
        if given is None:
            gathered = gathered.plus(Statistics.load(counted))
    return Reference(images, calls, gathered if given is None else given)


def _recorded(path: Path, name: str, recorder: Recorder) -> RecordedEngine:
    return RecordedEngine(start(read_blocked(path), path.parent, name), recorder.add)


def _some(kept: Sequence[Call]) -> list[Call]:
    """A few of the calls at odd places, from the first to the last."""
    odd = list(kept[1::2]) or list(kept)
    return [odd[place] for place in sorted({round(i * (len(odd) - 1) / (_CALLS - 1)) for i in range(_CALLS)})]


def _write(path: Path, image: Array, calls: Sequence[Call]) -> None:
    arrays: dict[str, Array] = {_IMAGE: image}
    for i, (feeds, outputs) in enumerate(calls):
        arrays |= {f"{i}.{_FEED}{key}": each for key, each in feeds.items()}
        arrays |= {f"{i}.{_OUT}{key}": each for key, each in outputs.items()}
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> tuple[Array, list[Call]] | None:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays: Mapping[str, Array] = {key: found[key] for key in found.files}
        count = 1 + max(int(key.partition(".")[0]) for key in arrays if key != _IMAGE)
        calls = []
        for i in range(count):
            parts = [
                {k.removeprefix(f"{i}.{kind}"): v for k, v in arrays.items() if k.startswith(f"{i}.{kind}")}
                for kind in (_FEED, _OUT)
            ]
            calls.append((parts[0], parts[1]))
        return arrays[_IMAGE], calls
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def check_model(statistics: Statistics, model: str, groups: Sequence[Group], path: Path) -> Statistics:
    """`statistics`. Raises `DiffoundryError` when they are of another model, or damaged."""
    values = tuple(group.value for group in groups)
    if statistics.model != model or statistics.values != values:
        raise DiffoundryError(f"{path} is of another model: leave it out, and it is measured anew")
    whole = {OTHERS, *(layer.name for group in groups for layer in group.layers)} <= statistics.sizes.keys()
    if not whole or not statistics.counts.any() or not any(statistics.largest().values()):
        raise DiffoundryError(f"{path} is damaged: leave it out, and it is measured anew")
    return statistics
