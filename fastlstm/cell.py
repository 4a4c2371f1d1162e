"""One LSTM cell, forward and backward: the only place where its arithmetic is written.

The functions use nothing but ``+ - *`` and calls of ``sigmoid`` and ``tanh``, so the same code runs on torch tensors,
on Python or Numba scalars, and on the vectors whose operators emit LLVM instructions (`bind` swaps the two functions
in).

Source: Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), as in `torch.nn.LSTM`.
"""

import types
from collections.abc import Callable
from typing import Any

from torch import sigmoid, tanh

GATES = "ifgo"  # the order of the row blocks in weight_ih, weight_hh and the biases


def cell_forward(i_pre: Any, f_pre: Any, g_pre: Any, o_pre: Any, c_prev: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The new state and the four gates from the pre-activations and the old cell state: ``h, c, i, f, g, o``."""
    i, f, g, o = sigmoid(i_pre), sigmoid(f_pre), tanh(g_pre), sigmoid(o_pre)
    c = f * c_prev + i * g
    return o * tanh(c), c, i, f, g, o


def cell_backward(
    dh: Any, dc: Any, i: Any, f: Any, g: Any, o: Any, c_prev: Any
) -> tuple[tuple[Any, Any, Any, Any], Any]:
    """The gradients of the four pre-activations (in the order of `GATES`), and of ``c_prev``.

    ``dh`` and ``dc`` are the gradients of the new state. The new cell state is computed again from the gates: one
    product costs less than a load.
    """
    tanh_c = tanh(f * c_prev + i * g)
    dc = dh * o * (1.0 - tanh_c * tanh_c) + dc
    di, df, dg, do = dc * g, dc * c_prev, dc * i, dh * tanh_c
    return (di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g * g), do * o * (1.0 - o)), dc * f


def bind(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of `function` whose ``sigmoid`` and ``tanh`` (or any other global) are the ones given."""
    return types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
