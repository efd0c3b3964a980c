"""The stages of `compile` that need torch."""
