"""Spiking networks: neurons of norse, spikingjelly and snnTorch run all steps in one call on the CPU:

    model = norse.torch.SequentialState(torch.nn.Linear(784, 100), norse.torch.LIF())
    fastlstm.integrations.spiking.accelerate(model)

`accelerate` and `restore`, which are those of `fastlstm.integrations.places.Places`, are for norse's `LIF` and
spikingjelly's `LIFNode` with ``step_mode="m"``. `over_time` is for snnTorch's `Leaky`, of which a call is one step.
Potentials are equal up to rounding, and spikes unless a potential is as near as that to the threshold. A potential that
is infinite or NaN makes a spike NaN, where the libraries have 0 or 1.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastlstm.cells import Cell, abs, cell, sigmoid, square, stop_gradient, surrogate, where  # noqa: A004
from fastlstm.integrations.places import Place, Places, run_cell, takes

SLOPES = {  # by the name of a surrogate in lower case: its derivative at a distance from the threshold
    "atan": lambda x, width: width / 2 / (1 + square(torch.pi / 2 * width * x)),
    "fast_sigmoid": lambda x, width: 1 / square(width * abs(x) + 1),
    "sigmoid": lambda x, width: width * sigmoid(width * x) * (1 - sigmoid(width * x)),
}


@cell(gates={}, states=("spike", "v", "i"), inputs=("x",), params=("rate", "loss", "leak", "threshold", "v_reset"))
def of_norse(v: Any, i: Any, x: Any, rate: Any, loss: Any, leak: Any, threshold: Any, v_reset: Any) -> Any:
    i = i + x
    v = v + rate * ((leak - v) + i)
    spike = surrogate(v - threshold, SLOPES["fast_sigmoid"](v - threshold, 1.0))
    return spike, (1 - spike) * v + spike * v_reset, i + loss * i


@cache
def of_snntorch(slope: str) -> Cell:
    @cell(gates={}, states=("spike", "v"), inputs=("x",), params=("width", "beta", "threshold"))
    def leaky(v: Any, x: Any, width: Any, beta: Any, threshold: Any) -> Any:
        v = beta * v + x - stop_gradient(where(v - threshold > 0, 1.0, 0.0)) * threshold
        return surrogate(v - threshold, SLOPES[slope](v - threshold, width)), v

    return leaky


@cache
def of_spikingjelly(slope: str, decays_input: bool, is_hard: bool, is_detached: bool) -> Cell:
    @cell(gates={}, states=("spike", "v"), inputs=("x",), params=("width", "tau", "threshold", "v_reset"))
    def lif(v: Any, x: Any, width: Any, tau: Any, threshold: Any, v_reset: Any) -> Any:
        v = v + (x - (v - v_reset)) / tau if decays_input else v - (v - v_reset) / tau + x
        spike = 1 - surrogate(threshold - v, SLOPES[slope](v - threshold, width))  # which spikes at its threshold, too
        reset = stop_gradient(spike) if is_detached else spike
        return spike, (1 - reset) * v + reset * v_reset if is_hard else v - reset * threshold

    return lif


def over_time(neuron: Any, currents: Tensor, membrane: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a `Leaky` of snnTorch over currents (T, B, ...): ``spikes, membranes = over_time(self.lif1, self.fc1(x))``.

    The first potential `membrane` is (B, ...), or None for zeros. Returns what `neuron` returns for one step after the
    other: spikes and potentials, (T, B, ...) each. As in snnTorch they are float32 for currents of 16 bits, and under
    autocast, too.

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
    if not _leaky.is_of(type(neuron)):
        return ""
    options = ("reset_mechanism_val", "reset_delay", "init_hidden", "inhibition", "state_quant")
    function, factor = neuron.spike_grad, neuron.graded_spikes_factor
    plain = [getattr(neuron, name, None) for name in options] == [0, True, False, False, False]
    plain = plain and not factor.requires_grad and bool((factor == 1).all())
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
    changed = _unlike(module) or module.record_states
    if changed or x.is_sparse or x.dim() < 3 or not same or not takes(x, state.v, state.i):
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
_jelly = "spikingjelly.activation_based.neuron", "LIFNode", "spikingjelly", "2.0", _run_jelly, _unlike
_norse = "norse.torch", "LIF", "norse", "1.1", _run_norse, _unlike
_places = Places(__name__, Place(*_norse), Place(*_jelly, method="multi_step_forward"))
accelerate, restore, __getattr__ = _places.accelerate, _places.restore, _places.named
