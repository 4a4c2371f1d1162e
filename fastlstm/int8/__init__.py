"""LSTMs and GRUs with int8 weights for inference: their definition, how a call runs, the modules, and `quantize`.

docs/quantize.md says what they compute, how accurate they are, and how fast. The kernels are those of csrc/.
"""
