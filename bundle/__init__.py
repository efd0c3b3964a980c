"""The artifact that both halves share: layout, manifest, hashes, atomic writes."""

from .bundle import Bundle
from .errors import (
    BundleError,
    CheckpointError,
    DiffoundryError,
    EngineError,
    OverflowedError,
    RequestError,
    StoppedError,
)
from .manifest import FULL, MANIFEST_NAME, SCHEMA_VERSION, Component, Latents, Manifest, Prompt, Tensor, Variant

__all__ = [
    "FULL",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Component",
    "DiffoundryError",
    "EngineError",
    "Latents",
    "Manifest",
    "OverflowedError",
    "Prompt",
    "RequestError",
    "StoppedError",
    "Tensor",
    "Variant",
]
