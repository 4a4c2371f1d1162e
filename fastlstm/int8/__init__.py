"""LSTMs and GRUs with int8 weights for inference, see docs/quantize.md. The kernels are those of csrc/."""
