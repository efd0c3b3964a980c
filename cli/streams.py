"""Standard input, output and error that are closed, full or gone: what is said on the last is never worth a picture."""

from __future__ import annotations

import io
import os
import sys
import warnings
from typing import Any, TextIO

from ..common.errors import DiffoundryError


class _Output(io.FileIO):
    """Standard output: the first write that fails is an error of one line, and nothing is tried again."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if isinstance(error, BrokenPipeError):  # the reader has seen enough
                raise
            reason = f"standard output cannot be written ({error.strerror})"
            raise DiffoundryError(f"{reason}: send it to another file or program") from None


class _Messages(io.FileIO):
    """Standard error: what it does not take is lost."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Give the process all three streams, the missing ones on the null device.

    A file that is opened where one is missing would get its descriptor, and then what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest descriptor that is free
    if sys.stderr is sys.__stderr__:
        warnings.formatwarning = _one_line
    sys.stdout = _opened(sys.stdout, sys.__stdout__, _Output)
    sys.stderr = _opened(sys.stderr, sys.__stderr__, _Messages)


def shown(text: str) -> str:
    """A text of a file as a terminal may get it: what it would act on, such as colours, is escaped."""
    return "".join(
        each if each.isprintable() or each.isspace() else each.encode("unicode_escape").decode() for each in text
    )


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as it is shown, without the place in the code."""
    return f"Warning: {shown(' '.join(str(message).split()))}\n"


def _opened(stream: TextIO | None, at_start: TextIO | None, kind: type[io.FileIO]) -> TextIO:
    """`stream` over a file of `kind`, with the encoding and buffering that it had; one that was replaced stays."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123
    if stream is not at_start or not isinstance(stream, io.TextIOWrapper):
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(kind(stream.fileno(), "w", closefd=False)),
        stream.encoding,
        errors="backslashreplace",  # a terminal that cannot show a letter still gets the line
        line_buffering=stream.line_buffering or stream.write_through,
    )
