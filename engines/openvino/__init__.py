"""OpenVINO: Intel's CPUs, GPUs and NPUs, and any x86-64 processor."""
