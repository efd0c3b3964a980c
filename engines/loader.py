"""`EngineLoader`: loads the components of a bundle, all with one kind of engine and in one precision."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import AS_EXPORTED, EIGHT_BIT, FULL, PRECISIONS, STANDARD, Bundle, Variant
from ..common.checks import is_whole
from ..common.errors import EngineError
from .cache import EngineStore
from .changed import Changes, NewValue, Rows, new_values, places, together
from .engine import Engine
from .lora_denoiser import LoraDenoiser
from .names import FUSED_ENGINES, ONNXRUNTIME, OPENVINO, PLANNED, EngineName

if TYPE_CHECKING:
    from .tensorrt.plan import Plan, Shape


_BESIDE = "bf16"
"""What OpenVINO computes in what is not in eight bits, in the components where that was measured."""
_DENOISERS = ("denoiser", "controlled", "lora")
"""Roles of models that have the weights of the denoiser."""
_SMALL_BYTES = 64 << 20
"""A model under this has operators too small to be worth sharing among processors."""


def precisions_of(bundle: Bundle, engine: EngineName) -> list[str]:
    """The precisions that `bundle` has for `engine`.

    OpenVINO computes the fp32 models in 16 bits, where its loss was measured; the others read models of their own, and
    all do in eight bits.
    """
    own = {key for part in bundle.manifest.components.values() for key in part.variants}
    hinted = {key.partition("/")[0] for key in own if key.endswith(f"/{OPENVINO}")}
    written = {key.partition("/")[0] for key in own if not key.endswith(f"/{OPENVINO}")}
    low = {name for name in EIGHT_BIT if f"{name}/tensorrt" in own} if engine.backend in PLANNED else set()
    low |= {name for name in written if name == "int8" and engine.on_cpu}  # no processor computes in 8-bit floats
    known = {FULL, *hinted} if engine.backend == OPENVINO else written.difference(EIGHT_BIT)
    known |= low
    return [name for name in PRECISIONS if name in known]


class EngineLoader:
    """Loads the components of `bundle`. Nothing is loaded before `load`."""

    def __init__(
        self, bundle: Bundle, engine: str | None = None, precision: str | None = None, weight_budget: int | None = None
    ) -> None:
        """engine, precision: as `Pipeline` takes them. weight_budget: bytes of streamed weights that stay on the GPU.

        Raises `EngineError` when the engine is not to be had on this machine, or an option has no effect on it.
        """
        manifest = bundle.manifest
        self._bundle = bundle
        try:
            self.engine = EngineName.parse(manifest.engine if engine is None else engine)
        except EngineError as error:
            where = f"{bundle.root}/bundle.json: " if engine is None else ""
            raise EngineError(f"{where}{error}") from None
        self.precision = self._usual_precision() if precision is None else precision
        if weight_budget is not None and not (is_whole(weight_budget) and weight_budget > 0):
            raise EngineError(f"the budget for weights must be a number of bytes above 0, found {weight_budget!r:.80}")
        self._budget = weight_budget
        self._gpu: Any = None
        self._version = ""
        self._plans: dict[str, list[Plan]] = {}
        self._serving: dict[str, Plan] = {}
        self._small: dict[str, bool] = {}
        self._changes: dict[str, Changes] = {}
        self._rows: dict[str, Rows] = {}
        stored = [name for name, part in bundle.manifest.components.items() if part.storage]
        if stored and not self.engine.on_cpu:
            raise EngineError(
                f"{bundle.root} has the weights of {', '.join(stored)} in int8, for engines of the processor: choose "
                "--engine onnxruntime or openvino, or compile the checkpoint again without --text-storage-dtype"
            )
        if self.engine.backend == ONNXRUNTIME:
            from .onnxruntime import require_provider

            require_provider(self.engine.provider)
        if self.engine.backend in (ONNXRUNTIME, OPENVINO) and weight_budget is not None:
            raise EngineError("a budget for weights goes with TensorRT plans that stream them: leave it out")
        if self.engine.backend == OPENVINO:
            from .openvino.device import Device

            Device.open(self.engine.provider, FULL)
        self._check_precision()
        if self.engine.backend == OPENVINO:
            exact = self.precision in (AS_EXPORTED, *EIGHT_BIT)
            Device.open(self.engine.provider, FULL if exact else self.precision)
        self._fused = self.engine.fused and self._has_fused()
        if self._fused or self.engine.backend not in (ONNXRUNTIME, OPENVINO):
            self._open_gpu()
        self.lora = LoraDenoiser(bundle, self.engine == EngineName(ONNXRUNTIME, "cpu") and self.precision == FULL)

    @property
    def splits_rows(self) -> bool:
        """Whether its engines can share the rows of a call among the processors, see `load`."""
        return self.engine.backend == OPENVINO and self.engine.on_cpu

    def load(
        self, name: str, threads: int | None = None, share_rows: bool = False, more: Changes | None = None
    ) -> Engine:
        """The engine of component `name`. threads: of one operator on the CPU, or with `share_rows` of all rows.

        share_rows: let the engine share the rows of a bound call among the processors, where `splits_rows` says so.
        more: changes of its weights beside those of `change`.
        Raises `BundleError` when its files were changed, `EngineError` when it cannot be loaded.
        """
        from .onnxruntime import load_variant

        if self._is_made(name):
            return self.load_lora(self.lora.layout, threads)
        variant = self._variant(name)
        self.check(name)
        changes, source = self.changes_of(name)
        changes = together(changes, more) if more else changes
        rows = self._rows.get(name, {})
        if (changes or rows) and self.engine.backend in PLANNED:
            raise self._cannot_change()
        graphs = [self._bundle.path(graph) for graph in (variant.model, variant.per_prompt) if graph]
        changed = new_values(self._bundle, name, graphs, changes, source, rows) if changes or rows else {}
        if self._fused:
            from .onnxruntime_cuda import load_fused

            exact, captured = self.precision == FULL, self._bundle.component(name).role != "text"
            return load_fused(
                self._bundle.root, name, variant, self._gpu, exact=exact, captured=captured, changed=changed
            )
        if self._gpu is not None:
            return self._load_plans(name, variant)
        if self.engine.backend == OPENVINO:
            return self._load_openvino(name, variant, threads, share_rows, changed)
        return load_variant(
            self._bundle.root, name, variant, provider=self.engine.provider, threads=threads, changed=changed
        )

    def check(self, name: str) -> None:
        """Hold the files of component `name` that are loaded against their hashes, once. Raises `BundleError`."""
        if self._bundle.foreign:
            return
        component, variant, own = self._bundle.component(name), self._variant(name), f"{self.precision_of(name)}/"
        others = {f"{own}{engine}" for engine in FUSED_ENGINES}  # can be made again, and are not loaded here
        listed = [each.files for key, each in component.variants.items() if key.startswith(own) and key not in others]
        self._bundle.check({path for files in (component.files, variant.files, *listed) for path in files}, known=True)

    def load_lora(self, layout: int, threads: int | None = None) -> Engine:
        """The engine of the denoiser in memory that takes LoRAs as inputs, in this layout; see `LoraDenoiser`."""
        changes, source = self.changes_of(self.lora.name)

        def change(graph: Path) -> list[NewValue]:
            return new_values(self._bundle, source, [graph], changes, source)[graph] if changes else []

        return self.lora.load(layout, threads, change)

    def change(self, changes: Mapping[str, Changes], rows: Mapping[str, Rows]) -> None:
        """Let components be loaded with changed weights from now on, by the component that the weights are of.

        rows: of weights, in place of their own rows or behind them. The denoiser's changes are those of its other
        forms, too. Raises `EngineError` where the engine cannot; all is then as it was.
        """
        if (changes or rows) and self.engine.backend in PLANNED:
            raise self._cannot_change()
        before = self._changes, self._rows
        self._changes, self._rows = dict(changes), dict(rows)
        try:
            for name in self._bundle.manifest.components:
                own, source = self.changes_of(name)
                if own or name in self._rows:
                    variant = self._variant(name)
                    graphs = [self._bundle.path(graph) for graph in (variant.model, variant.per_prompt) if graph]
                    places(self._bundle, name, graphs, {*own, *self._rows.get(name, {})}, source)
        except BaseException:
            self._changes, self._rows = before
            raise

    def _cannot_change(self) -> EngineError:
        return EngineError(
            f"plans of {self.engine} hold their weights: run it with the engine onnxruntime, give the LoRA to "
            "`compile --lora`, or build a denoiser that takes it as inputs with `build --lora-rank`"
        )

    @property
    def changed(self) -> set[str]:
        """The components whose weights are changed."""
        return {*self._changes, *self._rows}

    def changes_of(self, name: str) -> tuple[Changes, str]:
        """The changes of the weights of component `name`, and the component whose they are."""
        denoiser = self._bundle.manifest.named("denoiser")
        is_one = self._is_made(name) or self._bundle.component(name).role in _DENOISERS
        source = denoiser if is_one else name
        return self._changes.get(source, {}), source

    def _is_made(self, name: str) -> bool:
        """Whether `name` is the denoiser that takes LoRAs, and is made in memory."""
        return name == self.lora.name and not self.lora.built

    def size_of(self, name: str) -> int:
        """The bytes on disk of the model of component `name`, about what it takes in memory; 0 where there is none."""
        if self._is_made(name):
            name = self._bundle.manifest.named("denoiser")
        try:
            files = self._variant(name).files
        except EngineError:
            return 0
        return sum(self._bundle.path(file).stat().st_size for file in files)

    def is_small(self, name: str) -> bool:
        """Whether the operators of component `name` are too small to be worth sharing among processors."""
        if name not in self._small:
            files = self._bundle.path(name).glob("model.onnx*")
            self._small[name] = sum(path.stat().st_size for path in files if path.is_file()) < _SMALL_BYTES
        return self._small[name]

    def precision_of(self, name: str) -> str:
        """The precision that component `name` is loaded in."""
        component = self._bundle.component(name)
        if self.precision in EIGHT_BIT and self.engine.backend in PLANNED:
            from .tensorrt.variants import model_of

            return FULL if component.role == "step" else model_of(component, self.precision)[0]
        if self.precision in EIGHT_BIT:
            return self.precision if component.variant(self.precision) is not None else self._hint(name)
        if self.engine.backend == OPENVINO and self.precision != AS_EXPORTED:
            return self.precision if f"{self.precision}/{OPENVINO}" in component.variants else FULL
        return FULL if component.role == "step" else self.precision

    def _hint(self, name: str) -> str:
        """What OpenVINO computes the floats of component `name` in; fp32 for another engine."""
        own = f"{self.precision}/{OPENVINO}" in self._bundle.component(name).variants
        if self.precision == AS_EXPORTED or self.engine.backend != OPENVINO or not own:
            return FULL
        return _BESIDE if self.precision in EIGHT_BIT else self.precision

    def plan_shapes(self, name: str) -> list[dict[str, Shape]]:
        """The usual shapes of the plans of component `name`; [] where it has none and takes any."""
        return [{key: part[1] for key, part in plan.profile.shapes.items()} for plan in self._usable_plans(name)]

    def most_rows(self, height: int, width: int) -> int | None:
        """The most rows of latents of this size that a plan of the U-Net takes; None where nothing sets a limit."""
        shapes = self._latents_of_plans()
        fitting = [high[0] for low, high in shapes if low[2] <= height <= high[2] and low[3] <= width <= high[3]]
        return max(fitting, default=None)

    def plan_sizes(self) -> list[tuple[Shape, Shape]]:
        """The least and the largest latents, (height, width), of each plan of the U-Net; [] where it takes any."""
        return [(low[2:], high[2:]) for low, high in self._latents_of_plans() if len(low) == 4]

    def _latents_of_plans(self) -> list[tuple[Shape, Shape]]:
        """The least and the largest shape of the latents, for each plan of the U-Net."""
        manifest = self._bundle.manifest
        latents = next(key for key, source in manifest.wiring.inputs.items() if source.startswith("latents"))
        shapes = [plan.profile.shapes[latents] for plan in self._usable_plans(manifest.named("denoiser"))]
        return [(low, high) for low, _, high in shapes]

    def info(self) -> dict[str, Any]:
        """The engine, the precision, and where there are plans the one that served each component last.

        With graphs made for CUDA, what was captured so far.
        """
        info: dict[str, Any] = {"engine": str(self.engine), "precision": self.precision}
        if self._fused:
            info["captured"] = list(self._gpu.captured)
        elif self._gpu is not None:
            info["plans"] = {
                name: {"key": plan.key, "profile": plan.profile.name} for name, plan in self._serving.items()
            }
        return info

    def _variant(self, name: str) -> Variant:
        """The model of a component in this precision. Raises `EngineError` when the bundle has none."""
        component, own = self._bundle.component(name), self.precision_of(name)
        if (
            self.engine.backend == OPENVINO
        ):  # which reads the operators of ONNX Runtime's CPU, and splits nothing itself
            hinted = component.variants.get(f"{self.precision}/{OPENVINO}")
            variant = hinted or component.variant(own, f"{ONNXRUNTIME}:cpu")
        elif self.precision in EIGHT_BIT and self.engine.backend in PLANNED:
            from .tensorrt.variants import model_of

            variant = model_of(component, self.precision)[1]
        else:
            provider = self.engine.provider if self.engine.backend == ONNXRUNTIME else ""
            variant = component.variant(own, f"{ONNXRUNTIME}:{provider}" if provider else STANDARD)
        if variant is None:
            raise EngineError(
                f"{self._bundle.root} has no {self.precision} model of {name}: "
                f"run `diffoundry build {self._bundle.root} --precision {self.precision}`"
            )
        return variant

    def _has_fused(self) -> bool:
        """Whether all components have graphs made for this engine; a warning says what to do where they have not."""
        own = f"{self.precision}/{self.engine}"
        components = self._bundle.manifest.components.values()
        if all(own in part.variants for part in components if part.role != "step"):
            return True
        if not self._bundle.foreign:
            root = self._bundle.root
            warnings.warn(
                f"{root} has no graphs made for {self.engine} in {self.precision}; its plain ones take longer: "
                f"run `diffoundry build {root} --engine {self.engine} --precision {self.precision}`",
                RuntimeWarning,
                stacklevel=3,
            )
        return False

    def _usual_precision(self) -> str:
        """That of the bundle where it was made for this engine, fp32 on the CPU elsewhere."""
        own = self._bundle.manifest.precision
        if own == AS_EXPORTED or not self.engine.on_cpu:
            return own
        faster = self.engine.backend == OPENVINO or own in EIGHT_BIT
        return own if own in self._precisions() and faster else FULL

    def _precisions(self) -> set[str]:
        return set(precisions_of(self._bundle, self.engine)) | ({AS_EXPORTED} if self._bundle.foreign else set())

    def _check_precision(self) -> None:
        if self.precision == "bf16" and self.engine == EngineName(ONNXRUNTIME, "cpu"):
            raise EngineError(
                "ONNX Runtime has no bfloat16 on the CPU: choose --precision fp32, or another engine, such as openvino"
            )
        known = self._precisions()
        if not isinstance(self.precision, str) or self.precision not in known:
            root, able = self._bundle.root, set(PRECISIONS) - ({"fp8"} if self.engine.on_cpu else set())
            can = self.precision in able and not self._bundle.foreign
            engine = f" --engine {self.engine}" if self.engine.backend == OPENVINO else ""
            other = f", or run `diffoundry build {root}{engine} --precision {self.precision}`" if can else ""
            stored = any(part.storage for part in self._bundle.manifest.components.values())
            if stored and self.precision in ("fp16", "bf16") and self.engine.backend != OPENVINO:
                other = ", or compile the checkpoint again without --text-storage-dtype"
            raise EngineError(
                f"{root} has the precisions {', '.join(sorted(known))} for {self.engine}, not {self.precision!r}: "
                f"choose one of them{other}"
            )

    def _open_gpu(self) -> None:
        from .gpu.gpu import shared

        if self._fused:
            from .onnxruntime_cuda import require_version

            require_version()
            self._gpu = shared()
            return
        from .tensorrt.backend import BACKENDS

        if self._bundle.foreign:
            raise EngineError(f"{self._bundle.root} holds no plans: make a bundle of the checkpoint with `compile`")
        backend = BACKENDS[self.engine.backend]
        self._version = str(backend.load().__version__)
        self._gpu = shared()
        backend.check_gpu(self._gpu.device.name, self._gpu.device.arch)

    def _load_openvino(
        self,
        name: str,
        variant: Variant,
        threads: int | None,
        share_rows: bool,
        changed: Mapping[Path, Sequence[NewValue]],
    ) -> Engine:
        from .onnxruntime import default_threads
        from .openvino.load import load_variant

        count = threads or default_threads()
        return load_variant(
            self._bundle,
            name,
            variant,
            provider=self.engine.provider,
            precision=self._hint(name),
            threads=count,
            streams=count if share_rows else 1,
            small=self.is_small(name),
            changed=changed,
        )

    def _load_plans(self, name: str, variant: Variant) -> Engine:
        from .tensorrt.engine import TensorRTEngine

        component = self._bundle.component(name)
        return TensorRTEngine(
            name,
            component.inputs,
            component.outputs,
            self._usable_plans(name),
            self._gpu,
            onnx=self._bundle.path(variant.model),
            weight_budget=self._budget,
            on_plan=lambda plan: self._serving.__setitem__(name, plan),
        )

    def _usable_plans(self, name: str) -> list[Plan]:
        """The plans of component `name` that run here, read and checked once; [] for an engine without plans."""
        if self._gpu is None or self._fused:
            return []
        from .tensorrt.plan import usable

        if name not in self._plans:
            store, own = EngineStore(self._bundle.root / "engines"), self.precision_of(name)
            variant, gpu = self._variant(name), self._gpu.device
            self._plans[name] = usable(store, name, variant, own, self.engine.backend, self._version, gpu)
        return self._plans[name]
