"""The LSTM's cell through ``triton.jit``, with sigmoid and tanh as a GPU computes them.

Two versions: exact, for float32 in full precision, and fast, for tf32 and 16 bits, where one instruction gives tanh to
11 bits. The interpreter has no such instruction and runs the exact one for both.
"""

import triton
import triton.language as tl

from fastlstm.backends.triton import INTERPRET
from fastlstm.cells.emit import load, python
from fastlstm.cells.library import lstm


@triton.jit
def tanh(x):
    y = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))  # exp may overflow to infinity: the result is then 1
    # Near zero that difference cancels: (tanh(x) / x - 1) / x^2 fitted for |x| < 0.63, to 8e-8 of tanh(x)
    z = x * x
    p = -0.33333275 + z * (0.13331266 + z * (-0.05372539 + z * (0.02059296 - z * 0.00565376)))
    return tl.where(tl.abs(x) < 0.625, x + x * (z * p), y)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def approximate_tanh(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


fast_tanh = tanh if INTERPRET else approximate_tanh


@triton.jit
def fast_sigmoid(x):
    return 0.5 * fast_tanh(0.5 * x) + 0.5


# The interpreter looks for tl in a function's globals
EXACT = {"sigmoid": sigmoid, "tanh": tanh, "tl": tl}
FAST = {"sigmoid": fast_sigmoid, "tanh": fast_tanh, "tl": tl}
_FORWARD, _BACKWARD = python(lstm.derived().forward), python(lstm.derived().backward)
exact_forward, fast_forward = (triton.jit(load(_FORWARD, "forward", names, __name__)) for names in (EXACT, FAST))
exact_backward, fast_backward = (triton.jit(load(_BACKWARD, "backward", names, __name__)) for names in (EXACT, FAST))


@triton.jit
def cell_forward(i_pre, f_pre, g_pre, o_pre, c_prev, PRECISION: tl.constexpr):
    if PRECISION == "ieee":
        return exact_forward(i_pre, f_pre, g_pre, o_pre, c_prev)
    else:
        return fast_forward(i_pre, f_pre, g_pre, o_pre, c_prev)


@triton.jit
def cell_backward(dh, dc, i, f, g, o, c_prev, PRECISION: tl.constexpr):
    if PRECISION == "ieee":
        return exact_backward(dh, dc, i, f, g, o, c_prev)
    else:
        return fast_backward(dh, dc, i, f, g, o, c_prev)
