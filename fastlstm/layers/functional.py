"""One LSTM layer, and one time step, as functions of their tensors."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastlstm.autograd.modes import autocast_of, no_autocast
from fastlstm.backends import settings
from fastlstm.backends.base import Layer
from fastlstm.backends.settings import Backend
from fastlstm.call import run
from fastlstm.cells import library
from fastlstm.cells.spec import Cell
from fastlstm.layers import input_checks
from fastlstm.layers.packing import Lengths, Resets, masks_of
from fastlstm.plan_cache import Plans

State = tuple[Tensor, Tensor]
_plans = Plans(caches=False)  # shared by all calls; keeps plans, no weights


@overload
def lstm(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Resets | None = None,
    reverse: bool = False,
    return_cells: Literal[False] = False,
    backend: Backend | None = None,
) -> tuple[Tensor, State]: ...


@overload
def lstm(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Resets | None = None,
    reverse: bool = False,
    return_cells: Literal[True],
    backend: Backend | None = None,
) -> tuple[Tensor, State, Tensor]: ...


@overload
def lstm(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Resets | None = None,
    reverse: bool = False,
    return_cells: bool,
    backend: Backend | None = None,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]: ...


def lstm(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    reset: Resets | None = None,
    reverse: bool = False,
    return_cells: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """Run one LSTM layer in one direction over whole sequences, time first.

    Args:
        x: (T, B, I), any strides.
        hx: initial states ``h_0`` and ``c_0`` (B, H), or None for zeros.
        weight_ih: (4H, I), with row blocks in the order i, f, g, o.
        weight_hh: (4H, H), or (4H, H / K) for K heads, each of which sees the h of its own units alone.
        bias_ih, bias_hh: (4H,).
        weight_hr: (P, H), which projects the hidden state. weight_hh is then (4H, P), and ``h_0``, ``h_n`` and the
            output are P wide.
        lengths: integer (B,): a tensor on any device, a list, or an array. Row b ends after lengths[b] steps: its
            output is zero from there on, and its last states are those at its end. With `reverse` it starts at its end.
            Lengths below 0 or beyond T raise if they can be read. They cannot be read on a GPU, while a graph is
            traced, or under torch.func; there they are clamped to 0..T.
        reset: boolean (T, B): a tensor, a list, or an array. The states are zero before the steps that are True, and
            gradients stop there. True past a row's end, which `lengths` says, has no effect.
        reverse: run from the last step to the first. Outputs stay in the order of `x`.
        return_cells: also return every cell state.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `use_backend` sets.

    Returns:
        ``output`` (T, B, H), ``(h_n, c_n)`` each (B, H), and with `return_cells` the cell states (T, B, H). Past a
        row's end these repeat its last cell state.

    Raises:
        ValueError: for a shape, dtype or device that does not fit, a length out of range, and an unknown backend.
        TypeError: if `x` or a weight is no tensor, `hx` no tuple or list of tensors, `reverse` no bool, or `lengths` or
            `reset` of the wrong type.
        RuntimeError: if `hx` has not two states, or if a backend that was asked for by name cannot run these tensors.

    Equivalent to one layer and direction of `torch.nn.LSTM`.
    """
    input_checks.check_given(x, hx)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (T, B, I), got {tuple(x.shape)}")
    _check_tensors(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    settings.check_bool("reverse", reverse)
    settings.check_bool("return_cells", return_cells)
    ends, begins = masks_of(lengths, reset, x)
    h_0, c_0 = (None, None) if hx is None else hx
    cell, of_product = (library.lstm, ()) if weight_hr is None else (library.lstm_projected, (weight_hr,))
    weights = weight_ih, weight_hh, bias_ih, bias_hh, *of_product
    layer = Layer(x, weights, (h_0, c_0), ends, begins, reverse, cell)
    output, last, others = run(layer, plans=_plans, backend=backend, inner_states=return_cells)
    if ends is not None and output.requires_grad:  # callers may write to the padding of their copy
        output, others = output.clone(), tuple([a.clone() for a in others])
    return (output, last, others[0]) if return_cells else (output, last)


def lstm_cell(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> State:
    """Run one time step and return ``(h, c)``, each (B, H). `x` is (B, I), and `hx` two states (B, H), or None.

    Raises what `lstm` raises. Equivalent to `torch.nn.LSTMCell`.
    """
    input_checks.check_given(x, hx)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (B, I), got {tuple(x.shape)}")
    _check_tensors(weight_ih, weight_hh, bias_ih, bias_hh)
    if weight_ih is None:
        raise ValueError("weight_ih must be given, got None")
    h, c = run_cell(library.lstm, x, hx, (weight_ih, weight_hh, bias_ih, bias_hh), backend, _plans)
    return h, c


def _check_tensors(*weights: Any) -> None:
    """Raise for what is no tensor, or has no dimensions. `weights`: None is left to later checks."""
    for name, a in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"), weights):
        if a is None:
            continue
        if not isinstance(a, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(a).__name__}")
        if a.dim() == 0:
            raise ValueError(f"{name} must have {1 if 'bias' in name else 2} dimensions, got none")


def run_cell(
    cell: Cell, x: Tensor, hx: Any, weights: tuple[Any, ...], backend: str | None, plans: Plans | None
) -> tuple[Tensor, ...]:
    """Run one time step of any cell, x (B, I) and states (B, H) or None, with a module's plans, and return the states.

    Under a CPU's autocast the states have the types that torch's cells give them, whose products are of autocast's type
    and whose other arithmetic has the type of the states before the step. What lies between is rounded less than there.
    """
    weight_ih = weights[0]
    if x.is_cpu and (to := autocast_of(x)) is not None:
        for name, a in zip(cell.states, hx or (x,) * len(cell.states)):
            to = torch.promote_types(to, a.dtype) if name in cell.states_read else to
        to = torch.float64 if weight_ih.dtype == torch.float64 else to  # autocast leaves float64 alone
        dtype = torch.promote_types(to, weight_ih.dtype)
        weights = tuple([None if a is None else a.to(dtype) for a in weights])
        hx = None if hx is None else tuple([a.to(dtype) for a in hx])
        with no_autocast(x):
            return tuple([a.to(to) for a in run_cell(cell, x.to(dtype), hx, weights, backend, plans)])
    if weight_ih.shape[0] == 0:  # torch's cell takes zero units
        h = x @ weight_ih.mT
        return h, *[h.clone() for _ in cell.states[1:]]
    states = (None,) * len(cell.states) if hx is None else tuple(hx)
    layer = Layer(x, weights, states, None, None, False, cell)
    return run(layer, plans=plans, backend=backend).last
