"""The artifact that both halves share: layout, manifest, hashes."""

from .bundle import Bundle
from .manifest import FULL, MANIFEST_NAME, SCHEMA_VERSION, Component, Latents, Manifest, Prompt, Tensor, Variant

__all__ = [
    "FULL",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "Bundle",
    "Component",
    "Latents",
    "Manifest",
    "Prompt",
    "Tensor",
    "Variant",
]
