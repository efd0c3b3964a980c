"""The stage of `compile` that makes one component in float32: traced, fused and held against torch, done once."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..bundle import FULL, STANDARD, Component, Variant
from ..bundle.reader import read
from ..common.errors import BundleError
from ..common.files import holds, link_or_copy, read_json, remove, sha256_file, sha256_json, write_json
from ..engines import EngineStore
from ..engines.names import ONNXRUNTIME
from ..engines.onnxruntime import OnnxRuntimeEngine, load_variant
from . import step_graph
from .checkpoint import Checkpoint
from .fuse import fuse
from .guard import guarded
from .place import STAGES, work_folder
from .plan import OPSET, ComponentPlan

_REVISION = 5
"""Raise it when the exporter writes something else from the same input."""
_STANDARD = f"{FULL}/{STANDARD}"
_FUSED = f"{FULL}/{ONNXRUNTIME}:cpu"


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished component: its manifest entry and its parity report."""

    component: Component
    parity: dict[str, Any]
    reference: dict[str, str]


class Components:
    """Makes the components of the bundle at `target`, in the folder that it is made in."""

    def __init__(
        self,
        source: Checkpoint,
        target: Path,
        provider: str,
        store: EngineStore | None,
        versions: Mapping[str, str],
    ) -> None:
        """provider: of ONNX Runtime, that components are held against torch on. store: where its engines are kept, if
        they are. versions: of all that has a hand in it.
        """
        self._source, self._target, self._work = source, target, work_folder(target)
        self._provider, self._store, self._versions = provider, store, versions

    def make(self, plan: ComponentPlan, source_hash: str) -> Stage:
        """The finished component, taken over from earlier work where its key and hashes hold."""
        key = sha256_json(
            {
                "revision": _REVISION,
                "source": source_hash,
                "inputs": [asdict(tensor) for tensor in plan.inputs],
                "outputs": [asdict(tensor) for tensor in plan.outputs],
                "facts": plan.facts,
                "versions": dict(self._versions),
                "opset": OPSET,
                "device": self._provider,
            }
        )
        done = self._finished(self._work, self._record(plan.name), key) or self._from_target(plan.name, key)
        if done is not None:
            if self._store is not None:
                self._load(plan.name, done.component)  # the engine, if this machine has none yet
            return done
        return self._build(plan, key)

    def make_step(self) -> Stage:
        """The step of the loop as a graph, held against the host's step."""
        from .validate import compare, save_reference

        model = f"{step_graph.NAME}/model.onnx"
        remove(self._work / step_graph.NAME)
        (self._work / step_graph.NAME).mkdir()
        step_graph.write_step(self._work / model)
        files = {model: sha256_file(self._work / model)}
        component = Component("step", variants={_STANDARD: Variant(model, files)}, key=sha256_json(files))
        cases = step_graph.step_cases()
        parity = compare(step_graph.NAME, self._load(step_graph.NAME, component), cases)
        reference = f"reports/reference/{step_graph.NAME}.npz"
        save_reference(self._work / reference, cases[0])
        return Stage(component, parity, {reference: sha256_file(self._work / reference)})

    def is_known(self, name: str) -> bool:
        """Whether a component was made before, here or in the bundle that is replaced."""
        return self._record(name) is not None or (self._target / "reports" / "stages" / f"{name}.json").is_file()

    def _record(self, name: str) -> dict[str, Any] | None:
        try:
            return read_json(self._work / STAGES / f"{name}.json", "the stage record")
        except BundleError:
            return None

    def _finished(self, root: Path, record: dict[str, Any] | None, key: str) -> Stage | None:
        if record is None or record.get("key") != key:
            return None
        try:
            component = read(Component, record["component"])
            stage = Stage(component, record["parity"], record["reference"])
            measured = all(float(case["max_abs_error"]) >= 0 for case in stage.parity["cases"])
            whole = holds(root, component.all_files()) and holds(root, stage.reference)
            graphs = (
                each.model in each.files and each.per_prompt in {"", *each.files}
                for each in component.variants.values()
            )
            if measured and whole and _STANDARD in component.variants and all(graphs):
                return stage
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        return None

    def _from_target(self, name: str, key: str) -> Stage | None:
        """The component of the bundle that stands at the target, linked into the work folder."""
        try:
            record = read_json(self._target / "reports" / "stages" / f"{name}.json", "the stage record")
        except BundleError:
            return None
        stage = self._finished(self._target, record, key)
        if stage is not None:
            for path in (*stage.component.all_files(), *stage.reference):
                link_or_copy(self._target / path, self._work / path)
            self._keep(name, stage)
        return stage

    def _keep(self, name: str, stage: Stage) -> None:
        (self._work / STAGES).mkdir(exist_ok=True)
        record = {
            "key": stage.component.key,
            "component": asdict(stage.component),
            "parity": stage.parity,
            "reference": stage.reference,
        }
        write_json(self._work / STAGES / f"{name}.json", record)

    def _build(self, plan: ComponentPlan, key: str) -> Stage:
        from .trace import trace
        from .validate import compare, save_reference, torch_cases

        folder = self._work / plan.name
        remove(folder)
        folder.mkdir()
        with guarded(f"the {plan.name} cannot be loaded"):
            module = plan.load()
        # the cases first: tracing may leave its marks on the module
        with guarded(f"the {plan.name} cannot be run in torch"):
            cases = torch_cases(plan, module)
        with guarded(f"the {plan.name} cannot be traced to ONNX"):
            trace(plan, module, folder)
        del module
        gc.collect()
        with guarded(f"the graph of the {plan.name} cannot be fused"):
            fused = fuse(folder / "model.onnx", plan.per_prompt)
        files = {f"{plan.name}/{path.name}": sha256_file(path) for path in sorted(folder.iterdir())}
        shutil.copyfile(self._source.folder(plan.source) / "config.json", folder / "config.json")
        config = f"{plan.name}/config.json"
        model, graphs = f"{plan.name}/model.onnx", {part: f"{plan.name}/{name}" for part, name in fused.items()}
        variants = {_STANDARD: Variant(model, {path: files[path] for path in files if path not in graphs.values()})}
        component = Component("denoiser", variants=variants, files={config: sha256_file(self._work / config)}, key=key)
        if fused:
            plain = OnnxRuntimeEngine.load(self._work / model, component=plan.name, provider=self._provider)
            compare(plan.name, plain, cases)
            del plain
            shared = {path: sha for path, sha in files.items() if path != model}
            variants[_FUSED] = Variant(graphs["fused"], shared, graphs.get("hoisted", ""))
        parity = compare(plan.name, self._load(plan.name, component), cases)
        reference = f"reports/reference/{plan.name}.npz"
        save_reference(self._work / reference, cases[0])
        stage = Stage(component, parity, {reference: sha256_file(self._work / reference)})
        self._keep(plan.name, stage)
        return stage

    def _load(self, name: str, component: Component) -> Any:
        variant = component.variant(FULL, f"{ONNXRUNTIME}:{self._provider}")
        assert variant is not None
        return load_variant(self._work, name, variant, provider=self._provider, store=self._store)
