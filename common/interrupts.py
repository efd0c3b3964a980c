"""Interrupts (SIGINT) that would be lost on their way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Those that came since `noting_interrupts` began."""

    def __init__(self) -> None:
        self._came = False

    def __bool__(self) -> bool:
        return self._came

    def heed(self) -> None:
        """Raise `KeyboardInterrupt` if one came."""
        if self._came:
            raise KeyboardInterrupt

    def note(self) -> None:
        """One came."""
        self._came = True


@contextmanager
def noting_interrupts() -> Iterator[Interrupts]:
    """Note each interrupt of the block, besides what is done with it anyway.

    What an interrupt raises may be lost: a library takes it for an error of its own, and Python drops what is raised
    while it ends an object. Where interrupts are ignored (a job in the background) they still are.
    """
    came = Interrupts()
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, frame: FrameType | None) -> None:
        came.note()
        usual(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, usual)
