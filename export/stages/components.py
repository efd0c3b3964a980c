"""The stage that traces the components of a checkpoint: each fused, held against torch, and done once."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...bundle import FULL, STANDARD, Bundle, Component, Variant
from ...bundle.ledger import Kind, Ledger
from ...bundle.manifest import Files
from ...bundle.precisions import FULL_MODEL, FULL_SHARE
from ...bundle.reports import with_report
from ...common.files import remove, sha256_file, sha256_json
from ...common.machine import available_memory
from ...common.progress import Meter
from ...engines.fusion.cpu import fuse_for_cpu
from ...engines.names import ONNXRUNTIME
from ...engines.onnxruntime import OnnxRuntimeEngine, load_variant
from ...engines.verify import save_case
from ...runtime.loop.step import STEP_NAME
from ..checkpoint import Checkpoint
from ..graphs import step
from ..graphs.spec import OPSET, ComponentSpec
from ..guard import guarded

_REVISION = 10
"""Raise it when the exporter writes something else from the same input."""
_STANDARD = f"{FULL}/{STANDARD}"
_FUSED = f"{FULL}/{ONNXRUNTIME}:cpu"


@dataclass(frozen=True, slots=True)
class Traced:
    """A finished component: its graphs, its configuration, its parity report, and torch's recorded outputs."""

    variants: dict[str, Variant]
    files: Files
    parity: dict[str, Any]
    reference: Files

    def __post_init__(self) -> None:
        try:
            measured = all(float(case["max_abs_error"]) >= 0 for case in self.parity["cases"])
        except (LookupError, TypeError, OverflowError):
            measured = False
        whole = all({each.model, each.per_prompt} <= {"", *each.files} for each in self.variants.values())
        recorded = bool(self.reference) or "twin" in self.parity
        if not measured or not whole or not recorded or _STANDARD not in self.variants:
            raise ValueError("it is not whole")

    def all_files(self) -> Files:
        """The files of all variants, of its configuration and of the recorded outputs."""
        return Component("step", variants=self.variants, files=self.files).all_files() | self.reference


TRACED = Kind(Traced, Traced.all_files)


@dataclass(frozen=True, slots=True)
class Tracer:
    """What components are traced with, and where what was done once is found.

    versions: of every tool that influences the traced graph; part of the key.
    keep_half: whether weights that are stored in half precision stay in it. validate: what is held against torch of
    components that have a twin: `full`, `twin`, or None for the whole where there is memory for it.
    """

    source: Checkpoint
    ledger: Ledger
    versions: Mapping[str, str]
    keep_half: bool = False
    validate: str | None = None

    def trace(self, bundle: Bundle, specs: Sequence[ComponentSpec], hashes: Mapping[str, str], meter: Meter) -> Bundle:
        """`bundle`, which lies in the ledger's working folder, with the variants of its components in fp32.

        hashes: of the weights of each folder of the checkpoint.
        """
        made: dict[str, tuple[Traced, str]] = {}
        for spec in specs:
            meter.show(spec.name)
            key = self._key(spec, hashes)
            traced = self.ledger.find(spec.name, key, TRACED)
            if traced is None or ("twin" in traced.parity and self._twin(spec) is None):  # what is whole is worth more
                traced = self.ledger.keep(spec.name, key, self._traced(spec))
            made[spec.name] = traced, key
            meter.step()
        meter.show(STEP_NAME)
        step_made = self._step()
        made[STEP_NAME] = step_made, sha256_json(step_made.variants[_STANDARD].files)
        meter.step()
        components, files = dict(bundle.manifest.components), dict(bundle.manifest.files)
        for name, (traced, key) in made.items():
            components[name] = replace(components[name], variants=traced.variants, files=traced.files, key=key)
            files |= traced.reference
        bundle = replace(bundle, manifest=replace(bundle.manifest, components=components, files=files))
        return with_report(bundle, "parity", {name: traced.parity for name, (traced, _) in made.items()})

    def _key(self, spec: ComponentSpec, hashes: Mapping[str, str]) -> str:
        return sha256_json(
            {
                "revision": _REVISION,
                "source": hashes[spec.source],
                "inputs": [asdict(tensor) for tensor in spec.inputs],
                "outputs": [asdict(tensor) for tensor in spec.outputs],
                "facts": spec.facts,
                "versions": dict(self.versions),
                "opset": OPSET,
            }
            | ({"storage": self._kept(spec)} if self._kept(spec) else {})
            | ({"more": [hashes[name] for name in spec.more_sources]} if spec.more_sources else {})
        )

    def _kept(self, spec: ComponentSpec) -> str | None:
        """The type in which the weights of a component stay as they are stored, None where they become float32."""
        return self.source.weights(spec.source).half if self.keep_half else None

    def _step(self) -> Traced:
        """The step of the loop as a graph, held against the host's step."""
        from ..graphs.validate import compare

        folder, model = self.ledger.work / STEP_NAME, f"{STEP_NAME}/model.onnx"
        remove(folder)
        folder.mkdir()
        step.write_step(folder / "model.onnx")
        variants = {_STANDARD: Variant(model, {model: sha256_file(folder / "model.onnx")})}
        cases = step.step_cases()
        parity = compare(STEP_NAME, self._load(STEP_NAME, variants), cases)
        return Traced(variants, {}, parity, self._reference(STEP_NAME, cases))

    def _traced(self, spec: ComponentSpec) -> Traced:
        from ..graphs.trace import trace
        from ..graphs.validate import compare, torch_cases

        work, name, kept = self.ledger.work, spec.name, self._kept(spec) is not None
        folder = work / name
        remove(folder)
        folder.mkdir()
        with guarded(f"the {name} cannot be loaded"):
            module = spec.load()
        # the cases first: tracing may leave its marks on the module
        twin = self._twin(spec)
        with guarded(f"the {name} cannot be run in torch"):
            cases = [] if twin else torch_cases(spec, module)
        stored = self.source.weights(spec.source)
        with guarded(f"the {name} cannot be traced to ONNX"):
            if spec.rewrite is not None:
                spec.rewrite(work / spec.rewrites / "model.onnx", folder)
            else:
                places = stored.places() if kept else None
                shares = work / spec.shares / "model.onnx" if spec.shares else None
                trace(spec, module, folder, stored.types, keep_half=kept, places=places, shares=shares)
        del module
        gc.collect()
        with guarded(f"the graph of the {name} cannot be fused"):
            graphs = fuse_for_cpu(folder / "model.onnx", spec.per_prompt)
        shutil.copyfile(self.source.folder(spec.source) / "config.json", folder / "config.json")
        files = {f"{name}/{path.name}": sha256_file(path) for path in sorted(folder.iterdir())}
        described = {path: files.pop(path) for path in list(files) if path.endswith(".json")}
        model, others = f"{name}/model.onnx", [f"{name}/{graph}" for graph in graphs or ()]
        variants = {_STANDARD: Variant(model, {path: files[path] for path in files if path not in others})}
        if graphs is not None and twin is None:
            plain = OnnxRuntimeEngine.load(work / model, component=name, low_memory=kept)
            compare(name, plain, cases)
            del plain
        if graphs is not None:
            shared = {path: sha for path, sha in files.items() if path != model}
            variants[_FUSED] = Variant(others[0], shared, others[1] if graphs[1] else "")
        if twin is not None:
            return Traced(variants, described, self._compared(twin) | {"twin": spec.about_twin}, {})
        parity = compare(name, self._load(name, variants, low_memory=kept), cases)
        return Traced(variants, described, parity, self._reference(name, cases))

    def _twin(self, spec: ComponentSpec) -> ComponentSpec | None:
        """What is held against torch in the place of a component, None where the component itself is."""
        kept, size = self._kept(spec) is not None, self.source.weights(spec.source).size
        memory = available_memory()
        small = memory is not None and size * FULL_SHARE > memory
        if spec.twin is None or not kept or self.validate == FULL_MODEL or (self.validate is None and not small):
            return None
        return spec.twin()

    def _compared(self, twin: ComponentSpec) -> dict[str, Any]:
        """The parity report of a twin, which is traced beside the component and removed again."""
        from ..graphs.trace import trace
        from ..graphs.validate import compare, torch_cases

        folder = self.ledger.work / f".{twin.name}.twin"
        remove(folder)
        folder.mkdir()
        try:
            module, stored = twin.load(), self.source.weights(twin.source)
            cases = torch_cases(twin, module)
            trace(twin, module, folder, stored.types, keep_half=True)
            del module
            gc.collect()
            graphs = fuse_for_cpu(folder / "model.onnx", twin.per_prompt)
            path = folder.relative_to(self.ledger.work).as_posix()
            variant = Variant(f"{path}/model.onnx", {})
            report = compare(twin.name, load_variant(self.ledger.work, twin.name, variant, low_memory=True), cases)
            if graphs is not None:
                variant = Variant(f"{path}/{graphs[0]}", {}, f"{path}/{graphs[1]}" if graphs[1] else "")
                report = compare(twin.name, load_variant(self.ledger.work, twin.name, variant, low_memory=True), cases)
        finally:
            remove(folder)
        return report

    def _reference(self, name: str, cases: Sequence[Any]) -> Files:
        path = f"reports/reference/{name}.npz"
        save_case(self.ledger.work / path, *cases[0])
        return {path: sha256_file(self.ledger.work / path)}

    def _load(self, name: str, variants: dict[str, Variant], *, low_memory: bool = False) -> Any:
        variant = variants.get(_FUSED) or variants[_STANDARD]
        return load_variant(self.ledger.work, name, variant, low_memory=low_memory)
