"""The sLSTM as xLSTM and TiRex run it: heads, a stabilizer that starts at the first step, clamps, and no product of x.

python examples/slstm.py

The sLSTM of Beck et al., xLSTM: extended long short-term memory, 2024, arXiv:2405.04517, is used with heads: the
product with h is block-diagonal. The products with x, which may be a convolution as well, are made outside of the
recurrence for all steps at once. So no gate of the cell sums x. Its values come as inputs, and `input` is None. The
script takes weights in the layout of such models, R (K, D, 4, D) and b (K, 4, D) for K heads of D units, compares
outputs and gradients with a plain loop, and prints how long both take.
"""

import time

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import fastlstm
from fastlstm.cells import cell, exp, log_sigmoid, maximum, sigmoid, tanh, where


def at_most(a, limit):
    return -maximum(-a, -limit)


@cell(gates={"i": "h", "f": "h", "z": "h", "o": "h"}, states=("h", "c", "n", "m"), inputs=("x_i", "x_f", "x_z", "x_o"))
def slstm_of_inputs(i, f, z, o, c, n, m, x_i, x_f, x_z, x_o):
    """A unit whose n is zero has seen nothing yet: its stabilizer m is its input gate's alone."""
    i, f_log = i + x_i, log_sigmoid(at_most(f + x_f, 15.0)) + m
    m = where(n > 0, maximum(i, f_log), i)
    i, f = at_most(exp(i - m), 1.0), at_most(exp(f_log - m), 1.0)
    c, n = f * c + i * tanh(z + x_z), f * n + i
    return sigmoid(o + x_o) * c / n, c, n, m


def layer_of(R: Tensor, b: Tensor) -> fastlstm.RNN:
    """Return a layer with weights in the layout of xLSTM and TiRex."""
    K, D = R.shape[:2]
    rnn = fastlstm.RNN(slstm_of_inputs, 0, K * D, heads=K, dtype=R.dtype)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(R.permute(2, 0, 3, 1).reshape(-1, D))
        rnn.bias_hh_l0.copy_(b.transpose(0, 1).flatten())
    return rnn


def loop(values: Tensor, R: Tensor, b: Tensor) -> Tensor:
    """Return the outputs (T, B, H) for values (4, T, B, H) of x, one step after the other."""
    (_, T, B, H), K = values.shape, len(R)
    h, c, n, m = values.new_zeros(4, B, H).unbind()
    outputs = []
    for t in range(T):
        products = torch.einsum("bkd,kdge->gbke", h.view(B, K, -1), R).flatten(2)
        i, f, z, o = values[:, t] + products + b.transpose(0, 1).reshape(4, 1, H)
        f_log = logsigmoid(f.clamp(max=15)) + m
        m = torch.where(n == 0, i, torch.maximum(i, f_log))
        i, f = (i - m).exp().clamp(max=1), (f_log - m).exp().clamp(max=1)
        c, n = f * c + i * z.tanh(), f * n + i
        h = o.sigmoid() * c / n
        outputs.append(h)
    return torch.stack(outputs)


def largest_difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def main(T: int = 64, B: int = 16, K: int = 4, D: int = 128) -> tuple[float, float, float]:
    """Return how far outputs, gradients and outputs in bfloat16 are from the plain loop's, of the largest values."""
    torch.manual_seed(0)
    R, b, values = torch.randn(K, D, 4, D) / D**0.5, torch.randn(K, 4, D), torch.randn(4, T, B, K * D)
    rnn, by_name = layer_of(R, b), dict(zip(slstm_of_inputs.inputs, values.requires_grad_()))
    output, direction = rnn(None, inputs=by_name)[0], torch.randn(T, B, K * D)
    expected = loop(values, R.requires_grad_(), b.requires_grad_())
    d_values, d_weight, d_bias = torch.autograd.grad(output, [values, rnn.weight_hh_l0, rnn.bias_hh_l0], direction)
    found = d_values, d_weight.view(4, K, D, D).permute(1, 3, 0, 2), d_bias.view(4, K, D).transpose(0, 1)
    pairs = list(zip(found, torch.autograd.grad(expected, [values, R, b], direction)))
    with torch.no_grad():
        rounded = rnn.bfloat16()(None, inputs={name: a.bfloat16() for name, a in by_name.items()})[0].float()
        errors = largest_difference(output, expected), max(largest_difference(*pair) for pair in pairs)
        errors += (largest_difference(rounded, expected),)
        of_outputs, of_gradients, of_bfloat16 = errors
        print(f"outputs differ by {of_outputs:.1e} of the largest, gradients by {of_gradients:.1e}, "
              f"bfloat16 {of_bfloat16:.1e}")  # fmt: skip
        rnn.float()
        for name, run in (("fastlstm", lambda: rnn(None, inputs=by_name)), ("plain loop", lambda: loop(values, R, b))):
            run()
            start = time.perf_counter()
            run()
            print(f"{name}: {1000 * (time.perf_counter() - start):.2f} ms")
    return errors


if __name__ == "__main__":
    main()
