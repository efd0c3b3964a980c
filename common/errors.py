"""Every error that diffoundry raises on purpose. The message names the remedy; the CLI prints it as one line."""

from __future__ import annotations


class DiffoundryError(Exception):
    """Base of all errors a user can cause or mend."""


class BenchError(DiffoundryError):
    """A measurement cannot be made, or a report of one cannot be read: a system is missing, fails or hangs."""


class BundleError(DiffoundryError):
    """A bundle is missing something, was changed after it was built, or cannot be read by this version."""


class CheckpointError(DiffoundryError):
    """A checkpoint cannot be compiled: not a diffusers folder, truncated, or of an unknown family."""


class EngineError(DiffoundryError):
    """An engine cannot be built, loaded or fed."""


class LoraError(DiffoundryError):
    """A LoRA or a textual inversion cannot be read, or does not fit the model."""


class OverflowedError(EngineError):
    """Latents or pictures came out NaN or infinite."""


class RequestError(DiffoundryError):
    """A generation was asked for that the bundle cannot do: a size, scheduler, step count, guidance or path."""


class StoppedError(DiffoundryError):
    """The progress callback asked the run to stop."""


def reason(error: BaseException, most: int = 300) -> str:
    """The first line of what a library's error says, at most `most` characters; its kind where it says nothing.

    A first line that only announces the second, such as "Error(s) in loading state_dict:", is given with it.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])[:most]
