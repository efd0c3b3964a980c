"""Figures that anyone can make again: each is a ratio to a peer measured in the same run."""
