"""What the tests of `fastlstm.RNN` share: cells, modules in float64, what they are called with, and a plain loop."""

import inspect
from functools import partial

import torch
from torch import Tensor

import fastlstm
from fastlstm import cells
from fastlstm.backends.base import WEIGHTS, Layer, hidden_size
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
    return products.view(H // D, B, len(weight) // H, D).permute(1, 2, 0, 3).reshape(B, len(weight))


def product_of(weight: Tensor, views: bool, value: Tensor) -> Tensor:
    """The product of a value of the step, (B, H) or with `views` (B, K, H / K), with a product's weight."""
    return by_heads(value.flatten(-2), weight).view_as(value) if views else by_heads(value, weight)


def by_steps(layer: Layer, heads: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """All states after each step, and the last ones, of one layer in one direction: what the function that the author
    wrote computes at each step. Where it has means of heads it gets values of (..., K, H / K).
    """
    views = heads > 1 and "mean_of_head" in layer.cell.derived().forward.operations()
    cell, (T, B), H = layer.cell, layer.x.shape[:2], hidden_size(layer)
    products = dict(zip(cell.products, layer.weights[WEIGHTS + len(cell.params) :]))
    state = [layer.x.new_zeros(B, H) if a is None else a for a in layer.states]
    after, taken = [[a.new_zeros(0)] * T for a in state], inspect.signature(cell).parameters
    for t in range(T - 1, -1, -1) if layer.reverse else range(T):
        held = torch.zeros(B, 1, dtype=torch.bool) if layer.lengths is None else (t >= layer.lengths).unsqueeze(1)
        if layer.reset is not None:
            state = [a.masked_fill(layer.reset[t].unsqueeze(1) & ~held, 0) for a in state]
        values = dict.fromkeys(cell.gates, layer.x.new_zeros(B, H))
        for operand, value, weight, bias in zip("xh", (layer.x[t], state[0]), layer.weights, layer.weights[2:]):
            if weight is not None:
                gates = [gate for gate, sums in cell.gates.items() if operand in sums]
                sums = value @ weight.mT if operand == "x" else by_heads(value, weight)
                for gate, part in zip(gates, (sums if bias is None else sums + bias).split(H, -1)):
                    values[gate] = values[gate] + part
        values |= dict(zip(cell.states, state))
        values |= {name: a.expand(B, H) for name, a in zip(cell.params, layer.weights[WEIGHTS:])}
        values |= {name: a[t] for name, a in zip(cell.inputs, layer.inputs)}
        if views:
            values = {name: a.unflatten(-1, (heads, -1)) for name, a in values.items()}
        values |= {name: partial(product_of, weight, views) for name, weight in products.items()}
        new = cell(**{name: values[name] for name in taken})
        new = new if isinstance(new, tuple) else (new,)
        new = [(a.flatten(-2) if views else a).expand(B, H) for a in new]
        state = [torch.where(held, a, b) for a, b in zip(state, new)]
        for k, (steps, a) in enumerate(zip(after, state)):
            steps[t] = a if k else a.masked_fill(held, 0)
    return [torch.stack(steps) if T else a.new_zeros(0, B, H) for steps, a in zip(after, state)], state


def loop(rnn, x, states=None, inputs=None, lengths=None, reset=None, return_states=False):
    """What `rnn` returns, time first, one layer and direction after the other."""
    cell, D, inputs = rnn._cell, 2 if rnn.bidirectional else 1, tuple((inputs or {}).values())
    states, last = states if isinstance(states, tuple) else (states,) * len(cell.states), []
    x = inputs[0][..., :0] if x is None else x
    names = [
        "weight_ih",
        "weight_hh",
        "bias_ih",
        "bias_hh",
        *cell.params,
        *(f"weight_{name}" for name in cell.products),
    ]
    for k in range(rnn.num_layers):
        sequences = []
        for direction in range(D):
            weights = tuple(getattr(rnn, f"{name}_l{k}{'_reverse' * direction}", None) for name in names)
            first = tuple(None if a is None else a[k * D + direction] for a in states)
            layer = Layer(x, weights, first, lengths, reset, direction == 1, cell, inputs)
            after, ends = by_steps(layer, getattr(rnn, "heads", 1))
            sequences.append(after)
            last.append(ends)
        together = [torch.cat(each, -1) for each in zip(*sequences)]
        x = together[0]
    last = tuple(torch.stack(each) for each in zip(*last))
    return (x, last, tuple(together)) if return_states else (x, last)
