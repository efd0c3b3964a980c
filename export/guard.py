"""Where others' code is called: whatever it raises becomes one line that says what failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..bundle import CheckpointError, DiffoundryError

_LONGEST = 300


def reason_of(error: BaseException) -> str:
    """The first line of what a library says, or the kind of its error where it says nothing."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return first[:_LONGEST]


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Raise `CheckpointError` with `what` and the reason for any error that is not ours and not of the disk."""
    try:
        yield
    except (DiffoundryError, OSError):
        raise
    except Exception as error:  # torch, diffusers, transformers and onnx each have their own ways of refusing
        raise CheckpointError(f"{what}: {type(error).__name__}: {reason_of(error)}") from error
