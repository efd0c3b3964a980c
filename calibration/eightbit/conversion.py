"""The denoiser of a bundle in eight bits: statistics, scales, what stays in float32, and the files."""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import EIGHT_BIT, FULL, Bundle
from ...bundle.workspace import HEAD
from ...common.arrays import Array
from ...common.checks import is_finite
from ...common.errors import DiffoundryError, OverflowedError
from ...common.files import read_json, remove, replacing, sha256_file, sha256_json, write_json
from ...common.progress import Progress
from ...engines.fusion.cpu import fuse_for_cpu
from ..graph import read
from ..quality import QualityError
from ..scan import Scan, run_loop
from .attention import LEAST_KEYS, Attention, attentions_of
from .controlled import CONTROLLED, LEFT_OUT, measure, read_before, widened, write_controlled
from .controlled import observe as observe_controlled
from .formats import Format, Scale
from .layers import Group, groups_of
from .pictures import sheet
from .reference import Call, Reference, check_model, observe
from .scales import candidates, choose
from .search import Probe, in_decibels, loss, losses_alone, search
from .smoothing import shifts, smooth
from .statistics import OTHERS, STRETCHES, Statistics
from .statistics import REVISION as STATISTICS_REVISION
from .switched import SwitchedEngine, switched
from .write import write

UNSEEN, FEW_KEYS, LOSS = "never seen", "few keys", "loss"
"""Reasons why a layer is not in eight bits."""
RULE = 4
"""Raise it when the same measurements would give other models."""
STATISTICS, PICTURES = "{}.statistics.npz", "{}.pictures.png"
"""Beside the models, for readers; of a precision."""
_PROBLEM = "problem"
"""In the figures of images that are not finite: what was wrong."""
_JUDGED, _LEAST_JUDGED, _MOST_JUDGED = 1200, 4, 12
"""Calls that scales are judged by: so many over the number of groups, and the least and most."""
_ALONE, _LEAST_ALONE, _MOST_ALONE = 256, 1, 8
"""Runs of the model in which groups lose alone, and the least and most calls for each."""


@dataclass(frozen=True, slots=True)
class Graphs:
    """A component in eight bits, as `EightBit` has its own: "" for a graph that there is not."""

    component: str
    model: str
    fused: str
    per_prompt: str
    files: dict[str, str]


Part = Group | Attention
"""What is in eight bits as a whole, or not at all."""


@dataclass(frozen=True, slots=True)
class EightBit:
    """The denoiser in eight bits.

    model: its graph, and fused and per_prompt the two that ONNX Runtime's CPU and OpenVINO read. files: the hashes of
    all, and of the documents: statistics and pictures, which no run needs. report: what was measured of each group.
    quality: of the images. controlled: the denoiser that controls act in, where it is in eight bits too.
    """

    model: str
    fused: str
    per_prompt: str
    files: dict[str, str]
    documents: tuple[str, ...]
    report: dict[str, Any]
    quality: dict[str, Any]
    controlled: Graphs | None = None


@dataclass(slots=True)
class Conversion:
    """bundle: which lies in a working folder. folder: for what a run that is stopped leaves to the next.

    calibration: statistics to take in place of new ones.
    """

    bundle: Bundle
    form: Format
    scan: Scan
    folder: Path
    calibration: Path | None
    progress: Progress
    _drawn: dict[tuple[str, ...], Path] = field(default_factory=dict, init=False)

    def run(self) -> EightBit:
        """Raises `QualityError` when the budget cannot be met, `DiffoundryError` for what cannot be calibrated."""
        name = self.bundle.manifest.named("denoiser")
        path = self.bundle.path(f"{name}/model.onnx")
        graph = read(path)
        groups, attentions = groups_of(graph), attentions_of(graph)
        if not groups:
            raise DiffoundryError(f"{name} has no layer with a form in eight bits: use --precision fp32")
        model = self._model(name)
        given = None
        if self.calibration is not None:
            given = check_model(Statistics.load(self.calibration), model, groups, self.calibration)
        self._open(model)
        reference = observe(self.bundle, name, groups, attentions, self.scan, self.folder, model, given, self.progress)
        self.scan.figures(reference.images, reference.images, self.form.name)  # a user's function fails now, or never
        return self._convert(name, path, groups, attentions if self.form.has_attention else [], reference)

    def _model(self, name: str) -> str:
        variant = self.bundle.component(name).variant(FULL)
        assert variant is not None  # `build` refuses a bundle without
        return sha256_json(variant.files)

    def _open(self, model: str) -> None:
        """Believe what an earlier run left where it was of the same models, prompts and settings."""
        key = {
            "model": model,
            "bundle": sha256_json(self.bundle.manifest.files),
            "scan": self.scan.record(self.bundle),
            "revision": [RULE, STATISTICS_REVISION],
        }
        head = self.folder / HEAD
        try:
            same = read_json(head, "the head") == key
        except (DiffoundryError, OSError):
            same = False
        if not same:
            remove(self.folder)
            self.folder.mkdir(parents=True)
            write_json(head, key)

    def _convert(
        self, name: str, path: Path, groups: list[Group], attentions: list[Attention], reference: Reference
    ) -> EightBit:
        statistics = reference.statistics
        calls = reference.sample(min(_MOST_JUDGED, max(_LEAST_JUDGED, _JUDGED // len(groups))))
        told, feeds = partial(self.progress, "scales, call"), [feeds for feeds, _ in calls]
        scales = self._scales(statistics, partial(choose, path, name, self.form, groups, statistics, feeds, told))
        seen = [group for group in groups if group.value in scales]
        told = partial(self.progress, "smoothing, group")
        scales = smooth(path, name, self.form, seen, scales, statistics, feeds[::2], told)
        moved = shifts(path, self.form, seen, scales, statistics)
        flops = {
            group.value: sum(layer.flops(statistics.sizes[layer.name]) for layer in group.layers) for group in seen
        }
        total = sum(flops.values()) + statistics.sizes[OTHERS]
        turned = self._attentions(attentions, statistics)
        for each, own in turned.items():
            scales |= own
            flops[each.value] = statistics.sizes[each.value]
        parts: list[Part] = [*seen, *turned]
        engine, clear = switched(path, name, self.form, scales, seen, list(turned), moved)
        try:
            shift = self._shifts_gain(engine, list(flops), calls[::2])
            moved = moved if shift else {}
            alone = self._alone(engine, reference, scales)
            order = sorted(flops, key=lambda value: (-alone[value] / max(flops[value], 1), value))

            def quality(kept: Collection[str]) -> Probe:
                share = sum(flops[value] for value in flops if value not in kept) / total
                return self._probe(name, engine, list(kept), share, reference, scales, shift)

            found, probes = search(order, flops, alone, quality)
            if found is not None:
                engine.choose([value for value in flops if value not in found.kept], shift)
                by_timestep = self._by_timestep(engine, calls)
        finally:
            clear()
        if found is None:
            best = max(probes, key=lambda probe: -math.inf if (m := probe.figures["measured"]) is None else float(m))
            reached, option = self.scan.missed([best.figures], self.form.name)
            raise QualityError(
                f"{self.form.name} images {reached} with {100 * best.share:.0f} % of the arithmetic in it, "
                f"{self.scan.budget_of(self.form.name).least:g} are asked: use a lower {option}, scan other prompts "
                "and more steps, or use --precision bf16, fp16 or fp32"
            )
        report = self._report(parts, [*groups, *attentions], scales, alone, flops, total, found, probes, statistics)
        report |= {"biases_corrected": shift, "by_timestep": by_timestep}
        low = [value for value in order if value not in found.kept]
        return self._write(name, path, scales, low, moved, found, reference, report)

    def _attentions(self, attentions: Sequence[Attention], statistics: Statistics) -> dict[Attention, dict[str, Scale]]:
        """The attentions that can be in eight bits, with the scales of what they read."""
        long = [each for each in attentions if statistics.sizes[each.keys] >= LEAST_KEYS]
        found = {each: each.scales(statistics.amax, self.form) for each in long}
        return {each: scales for each, scales in found.items() if scales is not None}

    def _by_timestep(self, engine: SwitchedEngine, calls: Sequence[Call]) -> list[dict[str, float]]:
        """The loss of the denoiser's outputs in single calls, from noise to picture."""
        wiring = self.bundle.manifest.wiring.inputs.items()
        name = next((name for name, source in wiring if source.startswith("timestep")), "")
        found = [
            {"timestep": float(np.max(call[0][name])) if name else 0.0, "loss_db": in_decibels(loss(engine, [call]))}
            for call in calls
        ]
        return sorted(found, key=lambda each: -each["timestep"])

    @staticmethod
    def _shifts_gain(engine: SwitchedEngine, values: list[str], calls: list[Call]) -> bool:
        """Whether the outputs of the denoiser with all groups in eight bits lose less with shifted channels."""
        lost = []
        for shift in (False, True):
            engine.choose(values, shift)
            lost.append(loss(engine, calls))
        return lost[1] < lost[0]

    def _scales(self, statistics: Statistics, make: Callable[[], dict[str, Scale]]) -> dict[str, Scale]:
        """What `make` gives, kept for a run that goes on."""
        record, key = self.folder / f"scales-{self.form.name}.json", sha256_json(candidates(statistics, self.form))
        found = self._kept(record, key, _is_scale)
        if found is None:
            found = {value: [each.scale, each.method, each.loss_db] for value, each in make().items()}
            write_json(record, {"key": key, "found": found})
        return {value: Scale(value, *found[value]) for value in statistics.values if value in found}

    def _alone(self, engine: SwitchedEngine, reference: Reference, scales: dict[str, Scale]) -> dict[str, float]:
        record = self.folder / f"alone-{self.form.name}.json"
        key = sha256_json([each.key() for each in scales.values()])
        found = self._kept(record, key, is_finite)
        if found is not None and found.keys() == set(engine.values):
            return {value: float(ratio) for value, ratio in found.items()}
        count = min(_MOST_ALONE, max(_LEAST_ALONE, _ALONE // len(engine.values)))
        alone = losses_alone(engine, reference.sample(count), partial(self.progress, "loss of each layer alone, call"))
        write_json(record, {"key": key, "found": alone})
        return alone

    def _probe(
        self,
        name: str,
        engine: SwitchedEngine,
        kept: list[str],
        share: float,
        reference: Reference,
        scales: dict[str, Scale],
        shift: bool,
    ) -> Probe:
        """Draw the prompts with all groups but those of `kept` in eight bits."""
        key = sha256_json([sorted(kept), shift, [each.key() for each in scales.values()]])
        record = self.folder / f"probe-{self.form.name}-{key[:16]}.json"
        found = self._kept(record, key)
        if found is not None and _PROBLEM in found:
            found = _overflowed(str(found[_PROBLEM]))
        elif found is not None:  # measured again: a user's function may be another
            drawn = _pictures(_images_of(record))
            found = None if drawn is None else self.scan.figures(drawn, reference.images, self.form.name)
        if found is None:
            engine.choose([value for value in engine.values if value not in kept], shift)
            text = f"quality with {100 * share:.0f} % in {self.form.name}, step"
            try:
                images = run_loop(self.bundle, {name: lambda: engine}, self.scan, text, self.progress)
                found = self.scan.figures(images, reference.images, self.form.name)
                with replacing(_images_of(record)) as beside, beside.open("wb") as file:
                    np.savez(file, allow_pickle=False, images=np.stack(images))  # type: ignore[arg-type]
            except OverflowedError as error:
                found = _overflowed(str(error))
            write_json(record, {"key": key, "found": found})
        self._drawn[tuple(kept)] = _images_of(record)
        return Probe(tuple(kept), share, self.scan.is_within(found, self.form.name), found)

    @staticmethod
    def _kept(record: Path, key: str, fits: Callable[[Any], bool] = lambda each: True) -> dict[str, Any] | None:
        """What an earlier run measured, None where it is not there or damaged. fits: whether one of it can be."""
        try:
            value = read_json(record, "a measurement")
        except (DiffoundryError, OSError):
            return None
        found = value.get("found")
        return found if value.get("key") == key and isinstance(found, dict) and all(map(fits, found.values())) else None

    def _report(
        self,
        seen: Sequence[Part],
        parts: Sequence[Part],
        scales: dict[str, Scale],
        alone: dict[str, float],
        flops: dict[str, int],
        total: int,
        found: Probe,
        probes: list[Probe],
        statistics: Statistics,
    ) -> dict[str, Any]:
        layers: list[dict[str, Any]] = [
            {
                "value": part.value,
                "layers": list(part.kinds),
                "share": round(flops[part.value] / total, 6),
                "loss_alone_db": in_decibels(alone[part.value]),
                "low": part.value not in found.kept,
                **_scaled(part, scales, statistics),
            }
            for part in seen
        ]
        kinds = {name: kind for part in parts for name, kind in part.kinds.items()}
        islands = [
            {"node": name, "op": kinds[name], "reason": LOSS, "measured": each["loss_alone_db"]}
            for each in layers
            if not each["low"]
            for name in each["layers"]
        ]
        untried = {part: _reason(part, statistics) for part in parts if part.value not in flops}
        islands += [
            {"node": name, "op": kind, "reason": reason}
            for part, reason in untried.items()
            for name, kind in part.kinds.items()
        ]
        count = sum(len(part.kinds) for part in parts)
        return {
            "precision": self.form.name,
            "rule": RULE,
            "scan": self.scan.record(self.bundle),
            "share": round(found.share, 4),
            "stretches": STRETCHES,
            "groups": layers,
            "unseen": [part.value for part, reason in untried.items() if reason == UNSEEN],
            "islands": islands,
            "reasons": dict(sorted(Counter(each["reason"] for each in islands).items())),
            "nodes": {"low": count - len(islands), "kept": len(islands)},
            "curve": [
                {
                    "kept": len(probe.kept),
                    "share": round(probe.share, 4),
                    "weights_bytes": _weight_bytes(seen, probe.kept),
                    "measured": probe.figures["measured"],
                    "psnr_db": probe.figures["psnr_db"],
                    "worst_db": probe.figures["worst_db"],
                }
                for probe in sorted(probes, key=lambda probe: -probe.share)
            ],
        }

    def _write(
        self,
        name: str,
        path: Path,
        scales: dict[str, Scale],
        low: Sequence[str],
        moved: dict[str, Array],
        found: Probe,
        reference: Reference,
        report: Any,
    ) -> EightBit:
        form = self.form.name
        made = self._graphs(name, write(path, name, self.form, scales, low, f"{form}.onnx", moved))
        controlled, measured = self._controlled(path, scales, low, moved, reference.statistics)
        saved = path.with_name(STATISTICS.format(form))
        reference.statistics.save(saved)
        with np.load(self._drawn[found.kept], allow_pickle=False) as drawn:
            pictures = sheet(reference.images, list(drawn["images"]))
        shown = path.with_name(PICTURES.format(form))
        with replacing(shown) as beside:
            beside.write_bytes(pictures)
        head = {"precision": form, "rule": RULE, **self.scan.asked(form)}
        quality = {
            **head,
            "scan": self.scan.record(self.bundle),
            "share": round(found.share, 4),
            **found.figures,
            **measured,
        }
        documents = {f"{name}/{each.name}": sha256_file(each) for each in (saved, shown)}
        return EightBit(
            *(made.model, made.fused, made.per_prompt, made.files | documents),
            tuple(documents),
            report,
            quality,
            controlled,
        )

    def _controlled(
        self,
        path: Path,
        scales: Mapping[str, Scale],
        low: Sequence[str],
        moved: Mapping[str, Array],
        statistics: Statistics,
    ) -> tuple[Graphs | None, dict[str, Any]]:
        """The denoiser that controls act in, None where there is none or the budget does not hold, and its figures.

        low: first what loses most for its share. Where the budget does not hold, it stays out.
        """
        name = self.bundle.manifest.named("controlled")
        if not name:
            return None, {}
        source, figures = self.bundle.path(f"{name}/model.onnx"), {}
        was = read_before(path, source)
        exact, largest = observe_controlled(self.bundle, name, was.keys(), self.scan, self.progress)
        scales = widened(scales, was, statistics.largest(), largest)
        for part in LEFT_OUT:
            own = low[round(part * len(low)) :]
            files = write_controlled(path, source, name, self.form, scales, own, moved)
            figures = measure(self.bundle, name, files[0], self.form, self.scan, exact, self.progress)
            figures |= {"kept": self.scan.is_within(figures, self.form.name), "low": len(own), "of": len(low)}
            if figures["kept"]:
                return self._graphs(name, files), {CONTROLLED: figures}
            for each in files:
                each.unlink()
        return None, {CONTROLLED: figures}

    def _graphs(self, name: str, files: Sequence[Path]) -> Graphs:
        """The written `files` of a component, with those that processors read beside them."""
        form, fused = self.form.name, None  # no processor computes in 8-bit floats
        if form == "int8":
            names = f"{form}.fused.onnx", f"{form}.per_prompt.onnx"
            fused = fuse_for_cpu(files[0], self.bundle.manifest.per_prompt(name), names)
        graphs = [files[0].with_name(each) for each in filter(None, fused or ())]
        relative = [each.relative_to(self.bundle.root).as_posix() for each in (*files, *graphs)]
        hashes = {each: sha256_file(self.bundle.root / each) for each in dict.fromkeys(relative)}
        placed = [f"{name}/{each}" if each else "" for each in fused or ("", "")]
        return Graphs(name, relative[0], placed[0], placed[1], hashes)


def is_document(path: str) -> bool:
    """Whether a file of a bundle is one that goes with a denoiser in eight bits, and that no run needs."""
    return Path(path).name in {each.format(form) for each in (STATISTICS, PICTURES) for form in EIGHT_BIT}


def _overflowed(problem: str) -> dict[str, Any]:
    """The figures of images that are not finite."""
    return {"psnr_db": None, "worst_db": None, "measured": None, _PROBLEM: problem}


def _pictures(path: Path) -> list[Array] | None:
    """The pictures that are kept there, None where they cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return list(found["images"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _weight_bytes(parts: Sequence[Part], kept: Collection[str]) -> int:
    """What the weights of layers take: a byte each in eight bits, four in float32."""
    groups = [part for part in parts if isinstance(part, Group)]
    return sum(math.prod(layer.shape) * (4 if group.value in kept else 1) for group in groups for layer in group.layers)


def _is_scale(found: Any) -> bool:
    """Whether `found` is what is kept of a `Scale`: its number, method and loss."""
    if not isinstance(found, list) or len(found) != 3:
        return False
    scale, method, loss_db = found
    return is_finite(scale) and scale > 0 and isinstance(method, str) and is_finite(loss_db)


def _reason(part: Part, statistics: Statistics) -> str:
    """Why a part was not tried in eight bits."""
    few = isinstance(part, Attention) and statistics.sizes[part.keys] < LEAST_KEYS
    return FEW_KEYS if few else UNSEEN


def _scaled(part: Part, scales: Mapping[str, Scale], statistics: Statistics) -> dict[str, Any]:
    """How what a part reads is scaled, for the report."""
    if isinstance(part, Group):
        found = scales[part.value]
        return {
            "scale": found.scale,
            "method": found.method,
            "loss_of_outputs_db": found.loss_db,
            "largest": [float(f"{x:.6g}") for x in _largest(statistics, part.value)],
        }
    given = [scales[name] for name in part.reads]
    return {
        "scale": [each.scale for each in given],
        "method": given[0].method,
        "loss_of_outputs_db": None,
        "largest": [float(f"{statistics.amax[name] * abs(factor):.6g}") for name, factor in part.sources],
    }


def _images_of(record: Path) -> Path:
    """Where the pictures of a measurement are kept."""
    return record.with_suffix(".npz")


def _largest(statistics: Statistics, value: str) -> list[float]:
    i = statistics.values.index(value)
    return [max(abs(float(a)), abs(float(b))) for a, b in zip(statistics.high[i], statistics.low[i], strict=True)]
