"""The engines of a bundle that are in memory: loaded when first used, kept, and never used in two processes."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..bundle import Bundle
from ..common.errors import EngineError
from ..engines import Engine
from ..engines.controlled import ControlledEngine, slots
from ..engines.loader import EngineLoader
from .loop.device import Phases
from .loop.host import HostStepper
from .loop.sample import Ports


class LoadedEngines:
    """Engines by the names of their components; several threads may ask for them.

    In a process that is forked later they are loaded again on the CPU; on a GPU every call raises `EngineError`.
    """

    _engines: dict[str, Engine]
    _phases: dict[tuple[str, ...] | None, Phases]

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
        self._controlled, controls = manifest.named("controlled"), manifest.with_role("control")
        self._stepping = {self._denoiser, self._step, self._controlled, *controls}
        self._sharing = self._stepping - {self._step}
        sources = {source.partition(".masked")[0]: name for name, source in manifest.wiring.inputs.items()}
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
            if name not in self._engines:
                load = self._given.get(name)
                engine = self._load(name) if load is None else load()
                self._engines[name] = engine if self._wrap is None else self._wrap(name, engine)
            return self._engines[name]

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
                if name in self._stepping:
                    self._phases.clear()  # which are bound to them

    def denoiser(self, controls: Sequence[str] | None = None) -> Engine:
        """The plain denoiser, or where `controls` is no None the one that is told more, with these acting in it."""
        if controls is None:
            return self(self._denoiser)
        plain = [tensor.name for tensor in self._bundle.component(self._denoiser).inputs]
        plain += [name for each in self._bundle.manifest.wiring.image_prompts.values() for name in each.inputs]
        return ControlledEngine(self(self._controlled), {name: self(name) for name in controls}, plain)

    def on_device(self, controls: Sequence[str] | None) -> bool:
        """Whether what these controls make can stay on a device. Nothing is loaded."""
        components = self._bundle.manifest.components
        takes = {tensor.name for tensor in components[self._controlled].inputs} if controls else set()
        return slots(takes, {name: components[name].outputs for name in controls or ()}) is not None

    def release_denoiser(self) -> None:
        """Drop all that steps."""
        self.release(*self._sharing)

    def phases(self, controls: Sequence[str] | None = None) -> Phases:
        """The denoiser and the `step` graph, bound on their device."""
        key = None if controls is None else tuple(controls)
        with self._lock:
            if key not in self._phases:
                self._phases[key] = Phases(self.denoiser(controls), self(self._step), self._ports)
            return self._phases[key]

    def host_stepper(self, controls: Sequence[str] | None = None) -> HostStepper:
        """The denoiser for a loop on the host; the rows of a call of a small one are shared among the processors."""
        shared = self._is_small() and not self._loader.splits_rows
        pool, workers = (self._pool, self._threads - 1) if shared else (None, 0)
        return HostStepper(self.denoiser(controls), self._ports, pool=pool, workers=workers)

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
