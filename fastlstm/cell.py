"""One LSTM cell, its derivative and its second derivative.

The arithmetic is written here and in ``csrc/cell.h`` alone, and a test compares the two. The functions use nothing but
``+ - *`` and calls of ``sigmoid`` and ``tanh``. So the same code runs on torch tensors, on Python or Numba scalars, and
on vectors whose operators emit LLVM instructions. `bind` puts other versions of the two calls in their place.

Source: Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), as in `torch.nn.LSTM`.
"""

import types
from collections.abc import Callable
from typing import Any

from torch import sigmoid, tanh

GATES = "ifgo"  # the order of the row blocks in weight_ih, weight_hh and the biases


def cell_forward(i_pre: Any, f_pre: Any, g_pre: Any, o_pre: Any, c_prev: Any) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Return ``h, c, i, f, g, o``: the new states and the four gates, from the pre-activations and ``c_prev``."""
    i, f, g, o = sigmoid(i_pre), sigmoid(f_pre), tanh(g_pre), sigmoid(o_pre)
    c = f * c_prev + i * g
    return o * tanh(c), c, i, f, g, o


def cell_backward(
    dh: Any, dc: Any, i: Any, f: Any, g: Any, o: Any, c_prev: Any
) -> tuple[tuple[Any, Any, Any, Any], Any]:
    """Return the gradients of the four pre-activations, in the order of `GATES`, and the gradient of ``c_prev``.

    ``dh`` and ``dc`` are the gradients of the new states. The new cell state is computed again from the gates, since
    one product costs less than a load.
    """
    tanh_c = tanh(f * c_prev + i * g)
    dc = dh * o * (1.0 - tanh_c * tanh_c) + dc
    di, df, dg, do = dc * g, dc * c_prev, dc * i, dh * tanh_c
    return (di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g * g), do * o * (1.0 - o)), dc * f


def cell_slopes(i: Any, f: Any, g: Any, o: Any, c_prev: Any) -> tuple[tuple[Any, Any, Any, Any], Any]:
    """Return the derivatives of the new cell state by i_pre, f_pre and g_pre, and of the new hidden state by o_pre;
    then the derivative of the new hidden state by the new cell state. That of the cell state by ``c_prev`` is ``f``.
    """
    tanh_c = tanh(f * c_prev + i * g)
    slopes = (g * i * (1.0 - i), c_prev * f * (1.0 - f), i * (1.0 - g * g), tanh_c * o * (1.0 - o))
    return slopes, o * (1.0 - tanh_c * tanh_c)


def cell_curvature(
    dh: Any, dc: Any, i: Any, f: Any, g: Any, o: Any, c_prev: Any, tangents: tuple[Any, Any, Any, Any], c_prev_t: Any
) -> tuple[tuple[Any, Any, Any, Any], Any]:
    """Return how the results of `cell_backward` change along tangents of the pre-activations and of ``c_prev``.

    ``dh`` and ``dc`` are held fixed. ``dc`` is the whole gradient of the new cell state: it includes the part that
    comes from ``dh``. The map is symmetric, so the same arithmetic is `cell_backward`'s own backward pass.
    """
    i_t, f_t, g_t, o_t = tangents
    i_t, f_t, g_t, o_t = i * (1.0 - i) * i_t, f * (1.0 - f) * f_t, (1.0 - g * g) * g_t, o * (1.0 - o) * o_t
    tanh_c = tanh(f * c_prev + i * g)
    bend = 1.0 - tanh_c * tanh_c
    c_t = f_t * c_prev + f * c_prev_t + i_t * g + i * g_t
    dc_t = dh * bend * (o_t - 2.0 * o * tanh_c * c_t)
    di = i * (1.0 - i) * (dc * g_t + dc_t * g) + dc * g * (1.0 - 2.0 * i) * i_t
    df = f * (1.0 - f) * (dc * c_prev_t + dc_t * c_prev) + dc * c_prev * (1.0 - 2.0 * f) * f_t
    dg = (1.0 - g * g) * (dc * i_t + dc_t * i) - 2.0 * dc * i * g * g_t
    do = dh * (o * (1.0 - o) * bend * c_t + tanh_c * (1.0 - 2.0 * o) * o_t)
    return (di, df, dg, do), dc * f_t + dc_t * f


def bind(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """Return a copy of `function` whose ``sigmoid`` and ``tanh``, or any other globals, are the given ones."""
    return types.FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__)
