"""The LSTM in plain PyTorch, one step at a time: the oracle of the tests, and the maths of every higher derivative.

All functions are differentiable and take weights of one layer, (4H, I), or of a stack of G of them, (G, 4H, I), whose
batch rows lie in G equal groups.
"""

import torch
from torch import Tensor

from fastlstm.backends.base import Traits
from fastlstm.cell import cell_backward, cell_forward

TRAITS = Traits()  # 16-bit numbers, rounded at every operation, would lose their digits
RESET, HOLD = 1, 2  # the step mask's values; 0 is an ordinary step


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None."""
    return None if dtype.is_floating_point else f"the reference backend needs floating-point tensors, got {dtype}"


def saved_shape(T: int, B: int, H: int, dtype: torch.dtype, groups: int | None = None) -> tuple[int, ...]:
    """Shape of the gates kept for the backward pass."""
    return T, B, 4 * H


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.mT`` for the rows of (..., B, K), by groups of rows where `weight` is a stack (G, N, K)."""
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
    """The order in which the time steps run."""
    return range(T - 1, -1, -1) if reverse else range(T)


def forward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    mask: Tensor | None,
    reverse: bool,
    save: bool,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer in one direction: ``h`` (T,B,H), ``h_n``, ``c_n`` (B,H), ``c`` (T,B,H), ``gates`` (T,B,4H), the last
    two empty unless `save`.

    ``h`` is the carried state: on a held step it repeats the state before. ``weight_hr`` (P,H) projects it, as in
    `torch.nn.LSTM`.
    """
    T = x.shape[0]
    if mask is not None:  # padding may be NaN, which a zero gradient would turn to NaN
        x = x.masked_fill((mask == HOLD).unsqueeze(-1), 0)
    preact_x = add_bias(linear(x, weight_ih), bias).unbind(0)  # a trace has these steps, and raises at others
    h, c = h_0, c_0
    hs, cs, gates = [h_0] * T, [c_0] * T, [preact_x[0]] * T
    for t in step_order(T, reverse):
        if mask is not None:
            reset, hold = (mask[t] == RESET).unsqueeze(-1), (mask[t] == HOLD).unsqueeze(-1)
            h, c = h.masked_fill(reset, 0), c.masked_fill(reset, 0)
        i, f, g, o = (preact_x[t] + linear(h, weight_hh)).chunk(4, -1)
        h_new, c_new, *ifgo = cell_forward(i, f, g, o, c)
        if weight_hr is not None:
            h_new = linear(h_new, weight_hr)
        if mask is not None:
            h_new, c_new = torch.where(hold, h, h_new), torch.where(hold, c, c_new)
        h, c = h_new, c_new
        hs[t], cs[t], gates[t] = h, c, torch.cat(ifgo, -1)
    saved = (torch.stack(cs), torch.stack(gates)) if save else (x.new_empty(0), x.new_empty(0))
    return torch.stack(hs), h.clone(), c.clone(), *saved


def backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    mask: Tensor | None,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    reverse: bool,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight_ih, weight_hh, bias, h_0 and c_0, each None where ``needs`` says nobody wants it."""
    T = x.shape[0]
    order = step_order(T, reverse)
    dh_t = torch.zeros_like(h_0) if dh_n is None else dh_n
    dc_t = torch.zeros_like(c_0) if dc_n is None else dc_n
    dpreacts, h_prevs = [h_0] * T, [h_0] * T
    for step in range(T - 1, -1, -1):
        t = order[step]
        h_prev, c_prev = (h[order[step - 1]], c[order[step - 1]]) if step else (h_0, c_0)
        if mask is not None:
            reset, hold = (mask[t] == RESET).unsqueeze(-1), (mask[t] == HOLD).unsqueeze(-1)
            h_prev, c_prev = h_prev.masked_fill(reset, 0), c_prev.masked_fill(reset, 0)
        dh_t = dh_t if dh is None else dh_t + dh[t]
        dc_t = dc_t if dc is None else dc_t + dc[t]
        i, f, g, o = gates[t].chunk(4, -1)
        dpre, dc_prev = cell_backward(dh_t, dc_t, i, f, g, o, c_prev)
        dpreact = torch.cat(dpre, -1)
        if mask is not None:
            dpreact = dpreact.masked_fill(hold, 0)
        dh_prev = linear(dpreact, weight_hh.mT)
        if mask is not None:
            dh_prev = torch.where(hold, dh_t, dh_prev).masked_fill(reset, 0)
            dc_prev = torch.where(hold, dc_t, dc_prev).masked_fill(reset, 0)
        dpreacts[t], h_prevs[t], dh_t, dc_t = dpreact, h_prev, dh_prev, dc_prev
    dpreact, h_prev, seen = torch.stack(dpreacts), torch.stack(h_prevs), x
    if mask is not None:  # zero times the NaN of a padding would be NaN
        held = (mask == HOLD).unsqueeze(-1)
        h_prev, seen = h_prev.masked_fill(held, 0), x.masked_fill(held, 0)
    return (
        linear(dpreact, weight_ih.mT) if needs[0] else None,
        weight_gradient(dpreact, seen, weight_ih) if needs[1] else None,
        weight_gradient(dpreact, h_prev, weight_hh) if needs[2] else None,
        bias_gradient(dpreact, bias) if needs[3] and bias is not None else None,
        dh_t if needs[4] else None,
        dc_t if needs[5] else None,
    )


def weight_gradient(dpreact: Tensor, inputs: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
    """The sum over all (T, B) rows of ``dpreact`` outer ``inputs``, by groups of rows where `weight` is a stack; added
    to `start`.
    """
    if weight.dim() == 2:
        rows = dpreact.shape[0] * dpreact.shape[1]  # of no columns, reshape could not infer them
        dpreact, inputs = dpreact.reshape(rows, dpreact.shape[-1]), inputs.reshape(rows, inputs.shape[-1])
        return dpreact.mT @ inputs if start is None else torch.addmm(start, dpreact.mT, inputs)
    dpreact, inputs = (a.unflatten(1, (weight.shape[0], -1)).transpose(0, 1).flatten(1, 2) for a in (dpreact, inputs))
    return dpreact.mT @ inputs if start is None else torch.baddbmm(start, dpreact.mT, inputs)


def bias_gradient(dpreact: Tensor, bias: Tensor) -> Tensor:
    """Column sums of ``dpreact``, by groups of rows where `bias` is (G, 4H)."""
    if bias.dim() == 1:
        return dpreact.sum((0, 1))
    return dpreact.unflatten(1, (bias.shape[0], -1)).sum((0, 2))
