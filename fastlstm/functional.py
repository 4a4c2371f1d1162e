"""One LSTM layer as a function: choose a backend, cast, apply.

`lstm` takes whole sequences, `lstm_cell` one time step. `run_layer` and `run_cell`, which also take what a module keeps
from call to call, are what `fastlstm.LSTM` and `fastlstm.LSTMCell` are built on.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastlstm import checks, dispatch, ops
from fastlstm.backends import aten, reference
from fastlstm.dispatch import Backend
from fastlstm.function import LSTMFunction, WithoutGradients, layer_op, narrowed
from fastlstm.inference import Slot, infer, infer_cast, packed_layer, packed_step, train
from fastlstm.levels import nests_forward_mode, under_vmap, wants_autograd, wants_gradient
from fastlstm.torch_private import allow_in_graph, dual_level, dual_level_in_graph, opened_by_graph

State = tuple[Tensor, Tensor]


@allow_in_graph  # what dynamo traces itself it guards, at every call: a hundred functions, settings and names
def _in_graph(dual: bool, *arguments: Any) -> tuple[Tensor, ...]:
    """`dual`: whether there is a level of dual numbers."""
    with opened_by_graph(dual):
        output, (h_n, c_n), *cells = _lstm(*arguments)
    return output, h_n, c_n, *cells


def run_layer(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    holds: bool = True,
    reverse: bool = False,
    return_cells: bool = False,
    backend: str | None = None,
    slot: Slot | None = None,
) -> Any:
    """What `lstm` does, for modules.

    Args, beside those of `lstm`:
        holds: False saves a copy of the output where the mask holds no step, or where the outputs of held steps are
            not looked at, which are then the states carried through.
        slot: a module's own, which keeps these weights packed while no gradient is wanted, and from step to step. With
            it a call under no transform takes shorter ways, see `fastlstm.inference`.
    """
    checks.check_given(x, hx)
    weights, options = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), (mask, holds, reverse, return_cells)
    if not torch.compiler.is_compiling():
        return _lstm(x, hx, *weights, *options, backend, slot)
    if backend is not None:
        dispatch.check_name(backend)
    if not _is_autocast(x):  # here already: what is raised in a graph becomes an error of dynamo's
        checks.check_layer(x, hx, *weights, mask)
    output, h_n, c_n, *cells = _in_graph(dual_level_in_graph(), x, hx, *weights, *options, dispatch.named(backend))
    return output, (h_n, c_n), *cells


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
    mask: Tensor | None = None,
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
    mask: Tensor | None = None,
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
    mask: Tensor | None = None,
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
    mask: Tensor | None = None,
    reverse: bool = False,
    return_cells: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, State] | tuple[Tensor, State, Tensor]:
    """One LSTM layer in one direction over a whole sequence, time first.

    Args:
        x: (T, B, I), any strides.
        hx: initial states ``h_0`` (B, H) and ``c_0`` (B, H), or None for zeros.
        weight_ih: (4H, I), row blocks in the order i, f, g, o. weight_hh: (4H, H). bias_ih, bias_hh: (4H,).
        weight_hr: (P, H): projects the hidden state; ``h_0`` and the output are then P wide, and weight_hh is (4H, P).
        mask: int32 (T, B): 0 an ordinary step; 1 reset, the state is zero before the step; 2 hold, the state is
            carried through and the output is zero.
        reverse: run from the last step to the first; outputs stay in the order of `x`.
        return_cells: also return every cell state.
        backend: a name of `fastlstm.dispatch.NAMES`; None takes `use_backend`'s.

    Returns:
        ``output`` (T, B, H), ``(h_n, c_n)`` each (B, H), and with `return_cells` the cell states (T, B, H).

    Raises:
        ValueError: for a shape, dtype or device that does not fit, and for an unknown backend.
        TypeError: where `x` is no tensor, or `hx` no tuple or list of tensors.
        RuntimeError: where `hx` has not two states; when the backend asked for by name cannot run these tensors, with
            its reason.

    Equivalent to one layer and direction of `torch.nn.LSTM`.
    """
    weights = weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    return run_layer(x, hx, *weights, mask=mask, reverse=reverse, return_cells=return_cells, backend=backend)


def _lstm(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    mask: Tensor | None,
    holds: bool,
    reverse: bool,
    return_cells: bool,
    backend: str | None,
    slot: Slot | None = None,
) -> Any:
    if slot is not None and weight_hr is None and not return_cells:
        weights = weight_ih, weight_hh, bias_ih, bias_hh
        if (result := infer(slot, x, hx, weights, reverse, backend, mask, holds)) is not None:
            h, h_n, c_n = result
            return h, (h_n, c_n)
    if _is_autocast(x):
        # autocast leaves float64 alone
        dtype = torch.float64 if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)
        if slot is not None and weight_hr is None and not return_cells:
            weights = weight_ih, weight_hh, bias_ih, bias_hh
            inferred = infer_cast(slot, x, hx, weights, reverse, backend, dtype, mask, holds)
            if inferred is not None:
                return inferred[0], (inferred[1], inferred[2])
        hx = hx if hx is None else (hx[0].to(dtype), hx[1].to(dtype))
        x, weight_ih, weight_hh = x.to(dtype), weight_ih.to(dtype), weight_hh.to(dtype)
        bias_ih, bias_hh, weight_hr = (None if a is None else a.to(dtype) for a in (bias_ih, bias_hh, weight_hr))
        weights, options = (weight_ih, weight_hh, bias_ih, bias_hh), (mask, holds, reverse, return_cells)
        with torch.autocast(x.device.type, enabled=False):  # the plain PyTorch maths would be cast once more
            return _lstm(x, hx, *weights, weight_hr, *options, backend)
    checks.check_layer(x, hx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, mask)
    T, B, _ = x.shape
    if weight_hr is None and not return_cells and T and B:
        weights, given = (weight_ih, weight_hh, bias_ih, bias_hh), hx or ()
        if wants_gradient(*weights, x, *given) and ops.is_plain(x, mask, *given):
            hides = mask is not None and holds
            trained = train(slot, x, given, weights, backend, mask=mask, hides=hides, reverse=reverse)
            if trained is not None:
                h, h_n, c_n = trained
                return h, (h_n, c_n)
    h_0, c_0 = hx or (None, None)
    if T == 0:
        h_0, c_0 = ops.states_of(h_0, c_0, x, weight_hh)
        output, cells = h_0.unsqueeze(0)[:0].clone(), c_0.unsqueeze(0)[:0].clone()
        states = h_0.clone(), c_0.clone()
        return (output, states, cells) if return_cells else (output, states)

    dtype = x.dtype
    name = dispatch.choose(
        backend,
        x.device,
        dtype,
        projected=weight_hr is not None,
        masked=mask is not None,
        cells=return_cells,
        transformed=under_vmap() or dual_level(),
        traced=not ops.is_plain(),  # of no tensors: whether anybody traces
    )
    if name == "aten":
        if bias_ih is None or bias_hh is None:  # it takes both or none
            bias = ops.sum_of_biases(bias_ih, bias_hh)
            bias_ih, bias_hh = bias, None if bias is None else torch.zeros_like(bias)
        present = [a for a in (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr) if a is not None]
        # a trace is taken once with gradients and once without, and has to be the same
        learns = torch.is_grad_enabled() or torch.jit.is_tracing()
        states = ops.states_of(h_0, c_0, x, weight_hh)
        output, h_n, c_n = aten.forward(x, present, *states, reverse, bias_ih is not None, learns)
        return output, (h_n, c_n)
    narrow = dtype == torch.bfloat16 and dispatch.traits(name).takes_bfloat16
    if B and narrow and weight_hr is None and not return_cells:
        layer = x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask
        if not wants_autograd(*layer) and ops.is_plain(*layer):
            first, second, h_0, c_0 = (a if a is None else a.float() for a in (bias_ih, bias_hh, h_0, c_0))
            call = x, weight_ih, weight_hh, first, h_0, c_0, mask, reverse, False
            h, h_n, c_n, *_ = dispatch.module(name).forward(*call, bias_hh=second)
            return _shown(h, mask, holds), (h_n.to(dtype), c_n.to(dtype))
    if dtype in (torch.bfloat16, torch.float16) and not dispatch.traits(name).takes_sixteen_bits:
        # 16 bits in memory alone
        originals = x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, weight_hr
        x, weight_ih, weight_hh = (a.float() for a in (x, weight_ih, weight_hh))
        others = bias_ih, bias_hh, h_0, c_0, weight_hr
        bias_ih, bias_hh, h_0, c_0, weight_hr = (a if a is None else a.float() for a in others)

    layer = x, weight_ih, weight_hh, bias_ih, bias_hh, h_0, c_0, mask
    if weight_hr is not None or nests_forward_mode():
        bias, (h_0, c_0) = ops.sum_of_biases(bias_ih, bias_hh), ops.states_of(h_0, c_0, x, weight_hh)
        h, h_n, c_n, c, _ = reference.forward(x, weight_ih, weight_hh, bias, h_0, c_0, mask, reverse, True, weight_hr)
    elif torch.jit.is_tracing():
        h, h_n, c_n, c = layer_op(*layer, reverse, return_cells, name)
    elif wants_autograd(*layer):
        packed = None
        if slot is not None and T == 1 and mask is None and dispatch.keeps_steps(name, dtype):  # one of many, as a rule
            packed = packed_layer(slot, x, hx, (weight_ih, weight_hh, bias_ih, bias_hh), backend)
        h, h_n, c_n, c, _ = LSTMFunction.apply(*layer, reverse, name, packed)
    else:
        h, h_n, c_n, c, _ = WithoutGradients.apply(*layer, reverse, return_cells, name)
    h = _shown(h, mask, holds)
    if h.dtype != dtype:
        h, h_n, c_n, c = narrowed((h, h_n, c_n, c), dtype, originals)
    return (h, (h_n, c_n), c) if return_cells else (h, (h_n, c_n))


def _is_autocast(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def run_cell(
    x: Tensor,
    hx: State | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    *,
    backend: str | None,
    slot: Slot | None = None,
) -> State:
    """What `lstm_cell` does, for modules; `slot` is as in `run_layer`."""
    checks.check_given(x, hx)
    if x.dim() != 2:
        raise ValueError(f"x must have shape (B, I), got {tuple(x.shape)}")
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        x = x.to(weight_ih.dtype)
        hx = hx if hx is None else (hx[0].to(x.dtype), hx[1].to(x.dtype))
        with torch.autocast("cpu", enabled=False):
            return run_cell(x, hx, weight_ih, weight_hh, bias_ih, bias_hh, backend=backend)
    if weight_ih.shape[0] == 0:  # no units, which torch's cell takes
        h = x @ weight_ih.mT
        return h, h.clone()
    weights = weight_ih, weight_hh, bias_ih, bias_hh
    # a step with gradients is served by packed weights of as many bits
    if slot is not None and hx is not None and (x.itemsize > 2 or not wants_gradient(*weights, x, *hx)):
        layer = packed_layer(slot, x.unsqueeze(0), hx, weights, backend)
        # what autograd saves must not depend on whether they were packed before: a checkpoint would not take it
        if layer is not None and (state := packed_step(slot, x, hx, weights, backend)) is not None:
            return state
    return run_layer(x.unsqueeze(0), hx, weight_ih, weight_hh, bias_ih, bias_hh, backend=backend, slot=slot)[1]


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

    Raises what `lstm` raises. Equivalent to `torch.nn.LSTMCell`, which a CPU's autocast leaves in the weights' dtype: a
    cell state rounded to 16 bits at every step would not last.
    """
    return run_cell(x, hx, weight_ih, weight_hh, bias_ih, bias_hh, backend=backend)


def _shown(h: Tensor, mask: Tensor | None, holds: bool) -> Tensor:
    """The outputs: zeros at steps that are held, where the mask may hold any."""
    return h.masked_fill((mask == reference.HOLD).unsqueeze(-1), 0) if mask is not None and holds else h
