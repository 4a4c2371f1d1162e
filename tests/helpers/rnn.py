"""What the tests of `fastlstm.RNN` share: cells, modules in float64, what they are called with, and a plain loop."""

import inspect
from functools import partial

import torch
from torch import Tensor

import fastlstm
from fastlstm import cells
from tests.helpers.modules import randn


@cells.cell(gates={"a": "xh", "b": "x"}, states=("h", "v"), params=("p", "q"), inputs=("m", "d"))
def gadget(a, b, h, v, p, q, m, d):
    """Two products of different widths, two states, two params and two inputs."""
    v = p * v + cells.sigmoid(b) * d
    return m * h + cells.tanh(a + q * v), v


@cells.cell(gates={"a": "x"}, states=("h",))
def no_product(a, h):
    return cells.tanh(a) + 0.5 * h


@cells.cell(gates={"a": "h", "b": "h"}, states=("h", "c"), params=("p",), inputs=("x_a", "x_b"))
def without_x(a, b, c, p, x_a, x_b):
    """No product of x: its values come as inputs."""
    c = cells.sigmoid(a + x_a) * c + p * x_b
    return cells.tanh(b + c), c


@cells.cell(gates={"g": "xh", "n": "xh"}, states=("h",), params={"gain": 1.0, "shift": 0.0})
def of_heads(g, n, h, gain, shift):
    """Norms of gates and of the state, each head by itself, and more to keep without gradients than with them."""
    g, n = cells.sigmoid(g), cells.tanh(cells.layer_norm(n, weight=gain, bias=shift, of="head"))
    return cells.rms_norm(n + g * (h - n), eps=0.5, of="head")


@cells.cell(gates={"a": "x", "b": "h"}, states=("h", "c"), params=("p",), inputs=("u",))
def of_heads_and_rows(a, b, c, p, u):
    """Both kinds of means, one inside the other, and one that is saved."""
    c = cells.sigmoid(a - cells.mean(a)) * c + cells.tanh(b - cells.mean(b, of="head")) + u
    m = cells.mean(cells.exp(-c * c) + cells.mean(p * c, of="head"), of="head")
    return cells.tanh(c * m - cells.mean(m * c)), c


@cells.cell(
    gates={"a": "x", "b": "h", "d": "xh"},
    states=("y", "z"),
    params=("gain",),
    inputs=("u",),
    products=("d_m", "y_z", "z_m"),
)
def of_products(a, b, d, y, z, gain, u, d_m, y_z, z_m):
    """Two products of one value, a norm of heads over one of them, and a product of the second state's new value."""
    m = cells.tanh(a + u) * b
    d = cells.sigmoid(d + d_m(m))
    z = z + d * (cells.layer_norm(z_m(m), weight=gain, eps=0.1, of="head") - z)
    return y + d * (cells.tanh(y_z(z)) - y), z


RNN = partial(fastlstm.RNN, dtype=torch.float64)


def given(rnn, T=6, B=4):
    D = 2 if rnn.bidirectional else 1
    states = tuple(randn(rnn.num_layers * D, B, rnn.hidden_size) for _ in rnn.cell.states)
    if "n" in rnn.cell.states:  # which is a sum of positive numbers
        states = tuple(torch.zeros_like(a, requires_grad=True) for a in states)
    x = randn(T, B, rnn.input_size) if rnn.cell.gates_of_x else None
    return x, states, {name: randn(T, B, rnn.hidden_size) for name in rnn.cell.inputs}


def results(call, rnn, x, states, inputs=None, **masks):
    """Outputs and last states of `call`, which computes what `rnn` does, and the gradients of all they depend on."""
    dtype, count, inputs = rnn.weight_ih_l0.dtype, 1 + len(states), inputs or {}
    leaves = [a.detach().to(dtype).requires_grad_() for a in (x, *states, *inputs.values())]
    options = masks | ({"inputs": dict(zip(inputs, leaves[count:]))} if inputs else {})
    output, last = call(leaves[0], tuple(leaves[1:count]), **options)
    ends = [output, *last]
    directions = [torch.linspace(-1, 1, a.numel(), dtype=torch.float64).view_as(a).to(dtype) for a in ends]
    return [*ends, *torch.autograd.grad(ends, [*leaves, *rnn.parameters()], directions)]


def by_heads(h: Tensor, weight: Tensor) -> Tensor:
    """The product of h (B, H) with weight_hh (Y H, H / K): one product for each of K heads."""
    (B, H), D = h.shape, weight.shape[1]
    blocks = weight.view(-1, H // D, D, D).permute(1, 3, 0, 2).flatten(2)  # (K, D, Y D)
    products = torch.bmm(h.view(B, H // D, D).transpose(0, 1), blocks)
    return products.view(H // D, B, -1, D).permute(1, 2, 0, 3).reshape(B, -1)


def product_of(weight: Tensor, views: bool, value: Tensor) -> Tensor:
    """The product of a value of the step, (B, H) or with `views` (B, K, H / K), with a product's weight."""
    return by_heads(value.flatten(-2), weight).view_as(value) if views else by_heads(value, weight)


def loop(rnn, x, states, inputs, lengths=None, reset=None, views=False):
    """All states after each step of the last layer, and the last states of all: one layer and direction after the
    other, by the cell's own function, time first. x is None for a cell that has no gate for it. With `views` the
    function gets values of (..., K, H / K) for K heads.
    """
    cell, D, H = rnn.cell, 2 if rnn.bidirectional else 1, rnn.hidden_size
    T, B = next(iter(inputs.values())).shape[:2] if x is None else x.shape[:2]
    gates = {operand: [gate for gate, of in cell.gates.items() if operand in of] for operand in "xh"}
    last = []
    for layer in range(rnn.num_layers):
        sequences = []
        for direction in range(D):
            suffix = f"_l{layer}{'_reverse' * direction}"
            ih, hh, b_ih, b_hh = (
                getattr(rnn, name + suffix, None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            params = {name: getattr(rnn, name + suffix) for name in cell.params}
            weights = {name: getattr(rnn, f"weight_{name}{suffix}") for name in cell.products}
            params |= {name: partial(product_of, weight, views) for name, weight in weights.items()}
            state, after = [a[layer * D + direction] for a in states], [[] for _ in states]
            for t in range(T) if direction == 0 else reversed(range(T)):
                held = torch.zeros(B, 1, dtype=torch.bool) if lengths is None else (t >= lengths).unsqueeze(1)
                if reset is not None:
                    state = [a.masked_fill(reset[t].unsqueeze(1) & ~held, 0) for a in state]
                sums = dict.fromkeys(cell.gates, 0)
                for operand, product, bias in (
                    ("x", None if ih is None else x[t] @ ih.T, b_ih),
                    ("h", None if hh is None else by_heads(state[0], hh), b_hh),
                ):
                    if gates[operand]:
                        parts = (product if bias is None else product + bias).split(H, -1)
                        for gate, part in zip(gates[operand], parts):
                            sums[gate] = sums[gate] + part
                values = {**sums, **dict(zip(cell.states, state)), **params, **{k: a[t] for k, a in inputs.items()}}
                taken = {name: values[name] for name in inspect.signature(cell).parameters}
                if views:
                    taken |= {
                        name: a.unflatten(-1, (rnn.heads, -1)) for name, a in taken.items() if name not in weights
                    }
                new = cell(**taken)
                new = new if isinstance(new, tuple) else (new,)
                new = [a.flatten(-2) for a in new] if views else new
                state = [torch.where(held, a, b) for a, b in zip(state, new)]
                for k, (steps, a) in enumerate(zip(after, state)):
                    steps.append(a if k else a.masked_fill(held, 0))
            sequences.append([torch.stack(steps if direction == 0 else steps[::-1]) for steps in after])
            last.append(state)
        together = [torch.cat(each, -1) for each in zip(*sequences)]
        x = together[0]
    return together, tuple(torch.stack(each) for each in zip(*last))
