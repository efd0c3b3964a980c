"""Where others' code is called: whatever it raises becomes one line that says what failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..common.errors import CheckpointError, DiffoundryError, reason


@contextmanager
def guarded(what: str) -> Iterator[None]:
    """Raise `CheckpointError` with `what` and the reason for any error that is not ours and not of the disk."""
    try:
        yield
    except (DiffoundryError, OSError):
        raise
    except Exception as error:  # torch, diffusers, transformers and onnx each have their own ways of refusing
        raise CheckpointError(f"{what}: {type(error).__name__}: {reason(error)}") from error
