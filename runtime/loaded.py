"""The engines of a bundle that are in memory: loaded when first used, kept, and never used in two processes."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..bundle import Bundle
from ..bundle.wiring import STEPPING, plain
from ..common.errors import EngineError
from ..engines import Engine
from ..engines.controlled import ControlledEngine, slots
from ..engines.loader import EngineLoader
from .loop.device import Phases
from .loop.host import HostStepper
from .loop.sample import Ports
from .lora import Lora
from .lora_sets import LoraSets


class Form(NamedTuple):
    """Which of the denoisers of a bundle is to draw.

    controls: the components that act in it, None where it is told of neither controls nor pictures. loras: the layout
    in which it takes LoRAs as inputs, 0 where it takes none; see `LoraDenoiser`.
    """

    controls: tuple[str, ...] | None = None
    loras: int = 0


PLAIN = Form()
_MOST_ADAPTED = 8
"""Text encoders with changed weights that are kept in memory."""


class LoadedEngines:
    """Engines by the names of their components; several threads may ask for them.

    In a process that is forked later they are loaded again on the CPU; on a GPU every call raises `EngineError`.
    """

    _engines: dict[str, Engine]
    _phases: dict[Form, Phases]
    _adapted: OrderedDict[tuple[str, Hashable], Engine]
    _pool: ThreadPoolExecutor | None
    _layout: int

    def __init__(
        self,
        bundle: Bundle,
        loader: EngineLoader,
        threads: int,
        given: Mapping[str, Callable[[], Engine]],
        wrap: Callable[[str, Engine], Engine] | None = None,
    ) -> None:
        """threads: of the CPU. given: what loads a component, by its name, in place of `loader`.

        wrap: makes of a name and its engine, as soon as it is loaded, what is used in its place.
        """
        manifest = bundle.manifest
        self._bundle, self._loader, self._threads, self._given = bundle, loader, threads, dict(given)
        self._wrap = wrap
        self._denoiser, self._step = manifest.named("denoiser"), manifest.named("step")
        self._controlled, self._lora = manifest.named("controlled"), loader.lora.name
        self._stepping = {self._lora, *(name for role in ("step", *STEPPING) for name in manifest.with_role(role))}
        self._sharing = self._stepping - {self._step}
        sources = {plain(source): name for name, source in manifest.wiring.inputs.items()}
        self._ports = Ports(sources["latents"], sources["timestep"])
        self._process = os.getpid()
        self._start()
        _ALL.add(self)

    def __call__(self, name: str) -> Engine:
        """The engine of component `name`, loaded on first use.

        Raises `BundleError` when its files were changed, `EngineError` when it cannot be loaded.
        """
        self.check_process()
        with self._lock:
            if name == self._lora and self._layout != self._loader.lora.layout:
                self.release(name)
                self._layout = self._loader.lora.layout
            if name not in self._engines:
                load = self._given.get(name)
                engine = self._load(name) if load is None else load()
                self._engines[name] = engine if self._wrap is None else self._wrap(name, engine)
            return self._engines[name]

    def adapted(self, name: str, loras: Sequence[Lora], sets: LoraSets) -> Engine:
        """The engine of component `name` with its weights changed by `loras`; a few of them are kept."""
        self.check_process()
        changes = sets.text_changes(loras).get(name)
        if changes is None:
            return self(name)
        key = name, sets.key(loras)
        with self._lock:
            if key not in self._adapted:
                self._adapted[key] = self._loader.load(name, self._threads, more=changes)
            self._adapted.move_to_end(key)
            while len(self._adapted) > _MOST_ADAPTED:
                self._adapted.popitem(last=False)
            return self._adapted[key]

    @property
    def names(self) -> list[str]:
        """The components whose engines are in memory."""
        with self._lock:
            return list(self._engines)

    def release(self, *names: str) -> None:
        """Drop these engines and their memory; the next use loads them again."""
        self.check_process()
        with self._lock:
            for name in names:
                self._engines.pop(name, None)
                for key in [key for key in self._adapted if key[0] == name]:
                    del self._adapted[key]
                if name in self._stepping:
                    self._phases.clear()  # which are bound to them

    def check(self, name: str) -> None:
        """Raise `BundleError` where the files of component `name`, which is loaded later, were changed."""
        if name not in self._given and name not in self.names:
            self._loader.check(name)

    def denoiser(self, form: Form = PLAIN) -> Engine:
        """The denoiser in this form."""
        if form.loras:
            with self._lock:  # a newer one may have come since a run began
                newest = form.loras == self._loader.lora.layout
                return self(self._lora) if newest else self._loader.load_lora(form.loras, self._threads)
        if form.controls is None:
            return self(self._denoiser)
        plain = [tensor.name for tensor in self._bundle.component(self._denoiser).inputs]
        plain += [name for each in self._bundle.manifest.wiring.image_prompts.values() for name in each.inputs]
        return ControlledEngine(self(self._controlled), {name: self(name) for name in form.controls}, plain)

    def one_timestep(self, form: Form) -> bool:
        """Whether the denoiser takes one timestep for all rows of a call, as exports of other tools do."""
        shapes = {tensor.name: tensor.shape for tensor in self.denoiser(form).inputs}
        return shapes[self._ports.timestep] != shapes[self._ports.sample][:1]

    def on_device(self, form: Form) -> bool:
        """Whether what its controls make can stay on a device. Nothing is loaded."""
        components, controls = self._bundle.manifest.components, form.controls
        takes = {tensor.name for tensor in components[self._controlled].inputs} if controls else set()
        return slots(takes, {name: components[name].outputs for name in controls or ()}) is not None

    def release_denoiser(self) -> None:
        """Drop all that steps."""
        self.release(*self._sharing)

    def phases(self, form: Form = PLAIN) -> Phases:
        """The denoiser and the `step` graph, bound on their device."""
        with self._lock:
            if form not in self._phases:
                self._phases[form] = Phases(self.denoiser(form), self(self._step), self._ports)
            return self._phases[form]

    def host_stepper(self, form: Form = PLAIN) -> HostStepper:
        """The denoiser for a loop on the host; the rows of a call of a small one are shared among the processors."""
        shared = self._is_small() and not self._loader.splits_rows
        pool, workers = (self._pool, self._threads - 1) if shared else (None, 0)
        return HostStepper(self.denoiser(form), self._ports, pool=pool, workers=workers)

    def check_process(self) -> None:
        """Raise `EngineError` where a GPU was opened before this process was forked: it cannot be used in both."""
        if os.getpid() != self._process:
            raise EngineError("this pipeline was loaded in another process, before a fork: load the bundle in this one")

    def start_in_child(self) -> None:
        """Start again in a forked process, where the threads of the engines are not there."""
        if self._loader.engine.on_cpu:
            self._inherited = self._engines, self._phases, self._pool  # to end them would wait for their threads
            self._process = os.getpid()
            self._start()

    def _start(self) -> None:
        """Hold no engines, and locks and threads of this process."""
        self._lock = threading.RLock()
        self._engines = {}
        self._phases = {}
        self._layout = 0
        self._adapted = OrderedDict()
        self._pool = ThreadPoolExecutor(self._threads - 1, "diffoundry") if self._threads > 1 else None

    def _load(self, name: str) -> Engine:
        if name not in self._sharing or not self._is_small():
            return self._loader.load(name, self._threads)
        share_rows = self._loader.splits_rows
        return self._loader.load(name, self._threads if share_rows else 1, share_rows)

    def _is_small(self) -> bool:
        """Whether the denoiser's operators are too small to be shared among the processors."""
        return self._loader.engine.on_cpu and self._loader.is_small(self._denoiser)


_ALL: weakref.WeakSet[LoadedEngines] = weakref.WeakSet()


def _start_in_child() -> None:
    for engines in list(_ALL):
        engines.start_in_child()


if hasattr(os, "register_at_fork"):  # Windows has none
    os.register_at_fork(after_in_child=_start_in_child)
