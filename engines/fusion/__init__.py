"""Graphs with ONNX Runtime's own operators, made of exported ones by passes over the graph alone."""
