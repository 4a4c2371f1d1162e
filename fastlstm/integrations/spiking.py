"""Spiking networks: neurons of norse, spikingjelly and snnTorch run all steps in one call on the CPU.

`accelerate` and `restore` are for norse's `LIF` and spikingjelly's `LIFNode` with ``step_mode="m"``. `over_time` is for
snnTorch's `Leaky`, of which a call is one step. A potential that is infinite or NaN makes a spike NaN, where the
libraries have 0 or 1.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.cells import Cell
from fastlstm.integrations.calls import run_cell, takes
from fastlstm.integrations.places import Place, Places
from fastlstm.integrations.spiking_cells import SLOPES, of_norse, of_snntorch, of_spikingjelly


def over_time(neuron: Any, currents: Tensor, membrane: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a `Leaky` of snnTorch over currents (T, B, ...): ``spikes, membranes = over_time(self.lif1, self.fc1(x))``.

    The first potential `membrane` is (B, ...), or None for zeros. Returns the spikes and potentials of all steps, each
    (T, B, ...). As in snnTorch they are float32 for currents of 16 bits, and under autocast, too.

    Raises:
        TypeError: for any neuron but a `Leaky` that subtracts its threshold, with a `spike_grad` of snnTorch's that
            `SLOPES` has, and else without options but `threshold` and those of what it learns.
        ValueError: for currents without steps, rows or units, and for a `membrane` of another shape.
    """
    slope = _slope_of(neuron)
    if slope not in SLOPES:
        raise TypeError(f"neuron must be a Leaky of snnTorch with options that fastlstm takes, got {neuron!r}")
    if currents.dim() < 3 or not currents.numel():
        raise ValueError(f"currents must be (T, B, ...) with steps, rows and units, got {tuple(currents.shape)}")
    x = currents.to(torch.promote_types(currents.dtype, torch.float32))
    v = torch.zeros_like(x[0]) if membrane is None else membrane.to(x.dtype)
    if v.shape != x.shape[1:]:
        raise ValueError(f"membrane must be (B, ...) as in currents, {tuple(x.shape[1:])}, got {tuple(v.shape)}")
    widths = [a.cell_contents for a in neuron.spike_grad.__closure__]
    params = (*widths, neuron.beta.clamp(0, 1), neuron.threshold)
    with torch.autocast(x.device.type, enabled=False):
        result = _run(of_snntorch(slope), x, params, (v,), inner_states=True)
    return result.h.view_as(x), result.saved[0].view_as(x)


def _slope_of(neuron: Any) -> str:
    """Return the name of a neuron's surrogate in snnTorch, or "" for a neuron that fastlstm does not run."""
    options = ("reset_mechanism_val", "reset_delay", "init_hidden", "inhibition", "state_quant")
    plain = [getattr(neuron, name, None) for name in options] == [0, True, False, False, False]
    if not _leaky.is_of(type(neuron)) or not plain:
        return ""
    function, factor = neuron.spike_grad, neuron.graded_spikes_factor
    plain = not factor.requires_grad and bool((factor == 1).all())
    is_known = plain and getattr(function, "__module__", "") == "snntorch.surrogate"
    return function.__qualname__.partition(".")[0] if is_known else ""


def _run(kind: Cell, x: Tensor, params: tuple[Any, ...], states: tuple[Tensor, ...], **options: bool) -> Any:
    """Run a neuron over currents (T, B, ...), with params for all units or for each, and potentials (B, ...)."""
    vectors = [torch.as_tensor(a, dtype=x.dtype, device=x.device).broadcast_to(x.shape[2:]).flatten() for a in params]
    flat = tuple([a.flatten(1) for a in (torch.zeros_like(states[0]), *states)])
    no_input, weights = x.new_empty(*x.shape[:2], 0), (None, None, None, None, *vectors)
    return run_cell(kind, no_input, weights, flat, (x.flatten(2),), **options)


def _run_norse(module: Any, x: Tensor, state: Any = None) -> Any:
    """Do what `forward` of norse's `LIF` does."""
    state, p = module.state_fallback(x) if state is None else state, module.p
    same = all(isinstance(a, Tensor) and a.shape == x.shape[1:] for a in (state.v, state.i))
    changed = _unlike(module) or module.record_states or x.is_sparse
    if changed or x.dim() < 3 or not same or not takes(x, state.v, state.i):
        return None
    params = module.dt * p.tau_mem_inv, -module.dt * p.tau_syn_inv, p.v_leak, p.v_th, p.v_reset
    result = _run(of_norse, x, params, (state.v, state.i))
    v, i = (a.view_as(state.v) for a in result.last[1:])
    return result.h.view_as(x), state._replace(v=v, i=i)


def _run_jelly(module: Any, x: Tensor) -> Any:
    """Do what `multi_step_forward` of spikingjelly's `LIFNode` does."""
    v, reset, function = module.v, module.v_reset, module.surrogate_function
    v = v if isinstance(v, Tensor) else torch.full_like(x[0], v)
    changed = _unlike(module) or module._neuron_precision is not None or module.store_v_seq
    if changed or x.dim() < 3 or v.shape != x.shape[1:] or not takes(x, v):
        return None
    kind = of_spikingjelly(type(function).__name__.lower(), module.decay_input, reset is not None, module.detach_reset)
    result = _run(kind, x, (function.alpha, module.tau, module.v_threshold, reset or 0.0), (v,))
    module.v = result.last[1].view_as(v)
    return result.h.view_as(x)


def _unlike(module: Any) -> str:
    """Return what keeps a neuron as it is."""
    function = getattr(module, "surrogate_function", None)
    is_known = module.p.method == "super" if function is None else type(function).__name__ in ("ATan", "Sigmoid")
    return "" if is_known and getattr(function, "spiking", True) else "its surrogate is none that fastlstm has"


_leaky = Place("snntorch", "Leaky", "snntorch", "1.0", over_time)
_norse = Place("norse.torch", "LIF", "norse", "1.1", _run_norse, _unlike)
_JELLY = "spikingjelly.activation_based.neuron"
_jelly = Place(_JELLY, "LIFNode", "spikingjelly", "2.0", _run_jelly, _unlike, method="multi_step_forward")
_places = Places(__name__, _norse, _jelly)
accelerate, restore = _places.accelerate, _places.restore
