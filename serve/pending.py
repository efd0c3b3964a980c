"""An image that was asked for and is not there yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from .tickets import Ticket
from .turns import Turn


@dataclass(slots=True, eq=False, kw_only=True)
class Pending(Turn, ABC):
    """Image `index` of a ticket. came: when, by the clock of its queue.

    partials: the numbers of remaining steps at which it is shown.
    """

    ticket: Ticket
    index: int
    came: float = 0.0
    partials: list[int] = field(default_factory=list)

    @property
    @abstractmethod
    def has_begun(self) -> bool:
        """Whether it waits no more."""
