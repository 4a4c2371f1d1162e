"""The LSTM in plain PyTorch, one step at a time. The tests compare with it.

It also runs what aten lacks, and forward mode over forward mode. `fastlstm.autograd.linearized` has the other higher
derivatives. All functions are differentiable. They take weights of one layer, (4H, I), or of a stack of G layers,
(G, 4H, I), whose batch rows lie in G equal groups.
"""

import torch
from torch import Tensor

from fastlstm.backends.base import (
    Gradients,
    Layer,
    Run,
    Traits,
    bias_gradients,
    flat_input,
    given_states,
    held_steps,
    reset_steps,
    sum_of_biases,
    wants_bias,
)
from fastlstm.cell import cell_backward, cell_forward

TRAITS = Traits()  # no 16 bits, since rounding at every operation would lose their digits


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the backend cannot run these tensors, or None."""
    return None if dtype.is_floating_point else f"the reference backend needs floating-point tensors, got {dtype}"


def saved_shape(T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Return the shape of the gates kept for the backward pass."""
    return T, B, 4 * H


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.mT`` for x (..., B, K), by groups of rows if `weight` is a stack (G, N, K)."""
    if weight.dim() == 2:
        return x @ weight.mT
    return (x.unflatten(-2, (weight.shape[0], -1)) @ weight.mT).flatten(-3, -2)


def add_bias(preact: Tensor, bias: Tensor | None) -> Tensor:
    """Add (4H,) to every row, or row g of (G, 4H) to the rows of group g."""
    if bias is None:
        return preact
    if bias.dim() == 1:
        return preact + bias
    return (preact.unflatten(-2, (bias.shape[0], -1)) + bias.unsqueeze(-2)).flatten(-3, -2)


def step_order(T: int, reverse: bool) -> range:
    """Return the order in which the time steps run."""
    return range(T - 1, -1, -1) if reverse else range(T)


def forward(layer: Layer, save: bool, weight_hr: Tensor | None = None) -> Run:
    """Run one layer in one direction. With `save` the run keeps ``c`` (T, B, H) and ``gates`` (T, B, 4H).

    ``weight_hr`` (P, H) projects the hidden state, as in `torch.nn.LSTM`.
    """
    x, (weight_ih, weight_hh, *_) = flat_input(layer.x), layer.weights
    h, c = given_states(layer)
    T, held, (hs, cs, gates) = x.shape[0], held_steps(layer), ([h] * x.shape[0] for _ in range(3))
    reset = reset_steps(layer, held)
    if held is not None:  # padding may be NaN, and zero gradients times NaN are NaN
        x = x.masked_fill(held, 0)
    # unbind fixes the number of steps in a trace, which raises for any other
    preact_x = add_bias(linear(x, weight_ih), sum_of_biases(layer)).unbind(0)
    for t in step_order(T, layer.reverse):
        if reset is not None:
            h, c = h.masked_fill(reset[t], 0), c.masked_fill(reset[t], 0)
        i, f, g, o = (preact_x[t] + linear(h, weight_hh)).chunk(4, -1)
        h_new, c_new, *ifgo = cell_forward(i, f, g, o, c)
        if weight_hr is not None:
            h_new = linear(h_new, weight_hr)
        if held is not None:
            h_new, c_new = torch.where(held[t], h, h_new), torch.where(held[t], c, c_new)
        h, c = h_new, c_new
        hs[t], cs[t], gates[t] = h, c, torch.cat(ifgo, -1)
    output = torch.stack(hs)
    if held is not None:
        output = output.masked_fill(held, 0)
    return Run(output, (h.clone(), c.clone()), (torch.stack(cs), torch.stack(gates)) if save else ())


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients:
    """Return the gradients of x, weights and states that `needs` asks for, from `grads`, the gradients of a run."""
    x, (weight_ih, weight_hh, *_), states = flat_input(layer.x), layer.weights, given_states(layer)
    T, order, held = x.shape[0], step_order(x.shape[0], layer.reverse), held_steps(layer)
    reset, (c, gates) = reset_steps(layer, held), run.kept
    h_prev, c_prev = (
        before(run.h, states[0], layer, held, reset),
        before(c, states[1], layer, None, reset),
    )
    dh, (dh_n, dc_n), (dc, *_) = grads.h, grads.last, (*grads.kept, None)
    if dh is not None and held is not None:
        dh = dh.masked_fill(held, 0)
    dh_t = torch.zeros_like(states[0]) if dh_n is None else dh_n
    dc_t = torch.zeros_like(states[1]) if dc_n is None else dc_n
    dpreacts = [dh_t] * T
    for t in reversed(order):
        dh_t = dh_t if dh is None else dh_t + dh[t]
        dc_t = dc_t if dc is None else dc_t + dc[t]
        i, f, g, o = gates[t].chunk(4, -1)
        dpre, dc_prev = cell_backward(dh_t, dc_t, i, f, g, o, c_prev[t])
        dpreact = torch.cat(dpre, -1)
        if held is not None:
            dpreact = dpreact.masked_fill(held[t], 0)
        dh_prev = linear(dpreact, weight_hh.mT)
        if held is not None:
            dh_prev, dc_prev = torch.where(held[t], dh_t, dh_prev), torch.where(held[t], dc_t, dc_prev)
        if reset is not None:
            dh_prev, dc_prev = dh_prev.masked_fill(reset[t], 0), dc_prev.masked_fill(reset[t], 0)
        dpreacts[t], dh_t, dc_t = dpreact, dh_prev, dc_prev
    dpreact = torch.stack(dpreacts)
    if held is not None:  # zero times NaN in the padding would be NaN
        x, h_prev = x.masked_fill(held, 0), h_prev.masked_fill(held, 0)
    bias = sum_of_biases(layer)
    dbias = bias_gradient(dpreact, bias) if bias is not None and wants_bias(needs) else None
    return Gradients(
        linear(dpreact, weight_ih.mT) if needs.x else None,
        (
            weight_gradient(dpreact, x, weight_ih) if needs.weights[0] else None,
            weight_gradient(dpreact, h_prev, weight_hh) if needs.weights[1] else None,
            *bias_gradients(dbias, needs),
        ),
        (dh_t if needs.states[0] else None, dc_t if needs.states[1] else None),
    )


def before(a: Tensor, a_0: Tensor, layer: Layer, held: Tensor | None, reset: Tensor | None) -> Tensor:
    """Return the states (T, B, H) from which steps start: the last step's, `a_0` at first, zeros after a reset.

    `a` has no states at the steps that `held` marks. A row that runs backwards starts after them, from `a_0`.
    """
    if held is not None:
        a = torch.where(held, a_0, a)
    first = a_0.unsqueeze(0)
    a = torch.cat([a[1:], first] if layer.reverse else [first, a[:-1]])
    return a if reset is None else a.masked_fill(reset, 0)


def weight_gradient(dpreact: Tensor, inputs: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """Return `start` plus the sum of the outer products of ``dpreact`` and ``inputs`` over all (T, B) rows, by groups
    of rows if `weight` is a stack.
    """
    if weight.dim() == 2:
        rows = dpreact.shape[0] * dpreact.shape[1]  # with zero columns reshape could not infer them
        dpreact, inputs = dpreact.reshape(rows, dpreact.shape[-1]), inputs.reshape(rows, inputs.shape[-1])
        return dpreact.mT @ inputs if start is None else torch.addmm(start, dpreact.mT, inputs)
    dpreact, inputs = (a.unflatten(1, (weight.shape[0], -1)).transpose(0, 1).flatten(1, 2) for a in (dpreact, inputs))
    return dpreact.mT @ inputs if start is None else torch.baddbmm(start, dpreact.mT, inputs)


def bias_gradient(dpreact: Tensor, bias: Tensor) -> Tensor:
    """Return the column sums of ``dpreact``, by groups of rows if `bias` is (G, 4H)."""
    if bias.dim() == 1:
        return dpreact.sum((0, 1))
    return dpreact.unflatten(1, (bias.shape[0], -1)).sum((0, 2))
