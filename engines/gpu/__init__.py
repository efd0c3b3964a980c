"""An NVIDIA GPU: its memory, its stream, and captured launches, shared by all engines of a process."""
