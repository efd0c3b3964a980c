"""From a torch module to an ONNX graph that is held against it."""
