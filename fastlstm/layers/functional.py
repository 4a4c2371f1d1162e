"""One LSTM layer, and one time step, as functions of their tensors."""

from typing import Any, Literal, overload

from torch import Tensor

from fastlstm.autograd.modes import autocast_of, no_autocast
from fastlstm.backends.base import Layer, check_layer
from fastlstm.backends.dispatch import Backend
from fastlstm.layers import checks
from fastlstm.layers.packing import Lengths, lengths_of, reset_of
from fastlstm.plan import Plans, run

State = tuple[Tensor, Tensor]
_plans = Plans(keeps=False)  # of all calls of these functions


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
    reset: Tensor | None = None,
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
    reset: Tensor | None = None,
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
    reset: Tensor | None = None,
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
    reset: Tensor | None = None,
    reverse: bool = False,
    return_cells: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """One LSTM layer in one direction over a whole sequence, time first.

    Args:
        x: (T, B, I), any strides.
        hx: initial states ``h_0`` and ``c_0`` (B, H), or None for zeros.
        weight_ih: (4H, I), row blocks in the order i, f, g, o. weight_hh: (4H, H). bias_ih, bias_hh: (4H,).
        weight_hr: (P, H): projects the hidden state; ``h_0`` and the output are then P wide, and weight_hh is (4H, P).
        lengths: integer (B,), a tensor on any device, a list, or an array. Row b ends after lengths[b] steps: its
            output is zero from there on, its last states are those at the end, and with `reverse` it starts there. Each
            is from 0 to T. Where the values cannot be read, on another device than the CPU, while a graph is traced and
            under torch.func's transforms, below 0 counts as 0 and beyond T as T.
        reset: boolean (T, B). The states are zero before the steps that are True, and gradients stop there. Steps past
            a row's end are not reset.
        reverse: run from the last step to the first; outputs stay in the order of `x`.
        return_cells: also return every cell state.
        backend: a name of `fastlstm.backends.dispatch.NAMES`; None takes `use_backend`'s.

    Returns:
        ``output`` (T, B, H), ``(h_n, c_n)`` each (B, H), and with `return_cells` the cell states (T, B, H), of which
        those past a row's end repeat its last.

    Raises:
        ValueError: for a shape, dtype or device that does not fit, a length out of range, and an unknown backend.
        TypeError: where `x` is no tensor, `hx` no tuple or list of tensors, or `lengths` or `reset` of the wrong type.
        RuntimeError: where `hx` has not two states; when the backend asked for by name cannot run these tensors, with
            its reason.

    Equivalent to one layer and direction of `torch.nn.LSTM`.
    """
    checks.check_given(x, hx)
    if x.dim() != 3:
        raise ValueError(f"x must have shape (T, B, I), got {tuple(x.shape)}")
    T, batch = x.shape[0], (x.shape[1],)
    ends, begins = lengths_of(lengths, batch, T, x.device), reset_of(reset, batch, T, x.device, False)
    h_0, c_0 = (None, None) if hx is None else hx
    layer = Layer(x, (weight_ih, weight_hh, bias_ih, bias_hh), (h_0, c_0), ends, begins, reverse)
    if autocast_of(x) is None:
        check_layer(layer, weight_hr)
    result = run(layer, plans=_plans, backend=backend, cells=return_cells, weight_hr=weight_hr)
    output = result.output
    if ends is not None and output.requires_grad:  # callers may write to padding: a backward pass reads the other
        output = output.clone()
    return (output, result.last, result.cells) if return_cells else (output, result.last)


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
    """One time step: `x` (B, I), states (B, H) or None for zeros; returns ``(h, c)``, each (B, H).

    Raises what `lstm` raises. Equivalent to `torch.nn.LSTMCell`.
    """
    checks.check_given(x, hx)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (B, I), got {tuple(x.shape)}")
    return run_cell(x, hx, (weight_ih, weight_hh, bias_ih, bias_hh), backend, _plans)


def run_cell(x: Tensor, hx: State | None, weights: tuple[Any, ...], backend: str | None, plans: Plans | None) -> State:
    """What `lstm_cell` does, for modules, with the plans that they keep.

    A CPU's autocast leaves a cell in its weights' dtype, as it does `torch.nn.LSTMCell`: a cell state rounded to 16
    bits at every step would not last.
    """
    weight_ih = weights[0]
    if x.is_cpu and autocast_of(x) is not None:
        x = x.to(weight_ih.dtype)
        hx = None if hx is None else (hx[0].to(x.dtype), hx[1].to(x.dtype))
        with no_autocast(x):
            return run_cell(x, hx, weights, backend, plans)
    if weight_ih.shape[0] == 0:  # no units, which torch's cell takes
        h = x @ weight_ih.mT
        return h, h.clone()
    h_0, c_0 = (None, None) if hx is None else hx
    h, c = run(Layer(x, weights, (h_0, c_0), None, None, False), plans=plans, backend=backend).last
    return h, c
