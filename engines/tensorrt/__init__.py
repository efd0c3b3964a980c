"""TensorRT and TensorRT for RTX: plans built in a process of their own, and run with cuda-python."""
