"""The memory for activations, which all engines of a GPU use one after another."""

from __future__ import annotations

from ...common.errors import EngineError
from .cuda import Device, Memory

_LEAST = 256
"""An engine without activations is still given an address."""


class Arena:
    """One block, as large as the largest need so far. Growing moves it, and `generation` counts how often.

    What runs one after another in one stream may share it; a captured graph holds its address, and is captured anew
    when the generation has changed.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        self.generation = 0

    @property
    def address(self) -> int:
        """Where it lies, 0 while nothing was asked for."""
        return 0 if self._memory is None else self._memory.address

    @property
    def size(self) -> int:
        """Its bytes."""
        return 0 if self._memory is None else self._memory.size

    def grow(self, size: int, component: str) -> None:
        """Hold at least `size` bytes. Raises `EngineError` when the GPU has not as much; it is then empty."""
        size = max(size, _LEAST)
        if size <= self.size:
            return
        if self._device.capturing:
            raise EngineError(f"{component}: its activations have outgrown their memory while launches are captured")
        if self._memory is not None:
            self._memory.close()  # first, so that both need not fit; it waits for what runs in it
            self._memory = None
        self.generation += 1
        self._memory = self._device.allocate(size, f"the activations of {component}")
