"""Every error that diffoundry raises on purpose. The message names the remedy; the CLI prints it as one line."""

from __future__ import annotations


class DiffoundryError(Exception):
    """Base of all errors a user can cause or mend."""


class BundleError(DiffoundryError):
    """A bundle is missing something, was changed after it was built, or cannot be read by this version."""


class CheckpointError(DiffoundryError):
    """A checkpoint cannot be compiled: not a diffusers folder, truncated, or of an unknown family."""


class EngineError(DiffoundryError):
    """An engine cannot be built, loaded or fed."""


class OverflowedError(EngineError):
    """Latents or pictures came out NaN or infinite."""


class RequestError(DiffoundryError):
    """A generation was asked for that the bundle cannot do: a size, scheduler, step count, guidance or path."""


class StoppedError(DiffoundryError):
    """The progress callback asked the run to stop."""
