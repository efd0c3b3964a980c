"""The artifact that both halves share: layout, manifest, hashes."""

from .bundle import Bundle
from .manifest import AS_EXPORTED, MANIFEST_NAME, SCHEMA_VERSION, STANDARD, Component, Manifest, Tensor, Variant
from .precisions import EIGHT_BIT, FULL, PRECISIONS
from .wiring import Latents, Role, TextEncoder, Tokenizer, Wiring

__all__ = [
    "AS_EXPORTED",
    "EIGHT_BIT",
    "FULL",
    "MANIFEST_NAME",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "STANDARD",
    "Bundle",
    "Component",
    "Latents",
    "Manifest",
    "Role",
    "Tensor",
    "TextEncoder",
    "Tokenizer",
    "Variant",
    "Wiring",
]
