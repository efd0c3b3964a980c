"""Which kernels there are on CUDA, as the symbols of `onnxruntime_gpu-1.31.1` say."""

FLOATS, HALF = {"FLOAT", "FLOAT16"}, {"FLOAT", "FLOAT16", "BFLOAT16"}
KERNELS = {
    **dict.fromkeys(("NhwcConv", "GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "BiasAdd", "Resize", "Pad"), FLOATS),
    **dict.fromkeys(("MultiHeadAttention", "SkipLayerNormalization", "LayerNormalization", "QuickGelu"), HALF),
    **dict.fromkeys(("BiasGelu", "MatMul", "Gemm", "Conv", "Transpose", "Reshape", "Concat", "Slice", "Split"), HALF),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Sigmoid", "Gelu", "Cast", "Gather", "Sin", "Cos", "Expand"), HALF),
    **dict.fromkeys(("Unsqueeze", "Squeeze", "GatherND"), HALF),
    "InstanceNormalization": FLOATS,
    "ArgMax": FLOATS,
}
"""Types of floats that CUDA has kernels for, of each operator."""
