"""Checkpoints in one file, in the layout of the original authors: Stable Diffusion 1, 2, XL and its refiner."""

from .unpack import SingleFile, is_single_file

__all__ = ["SingleFile", "is_single_file"]
