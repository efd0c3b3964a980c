"""Checkpoints in one file, and parts of them, by the names of the original authors."""

from .unpack import SingleFile, is_single_file

__all__ = ["SingleFile", "is_single_file"]
