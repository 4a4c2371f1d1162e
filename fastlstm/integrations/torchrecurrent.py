"""torchrecurrent: its layers of the classes in `KINDS` make one call for all steps, on the CPU.

A layer with other activations than its class has by default stays as it is. In training, dropout between layers draws
its numbers in another order.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastlstm.cells import Cell, cell, cornn, li_gru, multiplicative_lstm, peephole_lstm, relu, sigmoid, tanh
from fastlstm.integrations.calls import run_cell, takes
from fastlstm.integrations.places import Place, Places


@cell(gates={"s": "xh", "n": "xh"}, states=("h", "c"), params=("beta",))
def janet(s: Any, n: Any, c: Any, beta: Any) -> Any:
    c = sigmoid(s) * c + (1 - sigmoid(s - beta)) * tanh(n)
    return c, c


@cell(gates={"n": "x", "f": "xh"}, states=("h",))
def light_ru(n: Any, f: Any, h: Any) -> Any:
    return h + sigmoid(f) * (tanh(n) - h)


@cell(gates={"f": "xh", "n": "x"}, states=("h",), products=("n_h",))
def mgu(f: Any, n: Any, h: Any, n_h: Any) -> Any:
    f = sigmoid(f)
    return h + f * (tanh(n + n_h(f * h)) - h)


@cell(gates={f"g{k}": "xh" for k in range(8)}, states=("h", "c"))
def nas(g0: Any, g1: Any, g2: Any, g3: Any, g4: Any, g5: Any, g6: Any, g7: Any, c: Any) -> Any:
    c = tanh(tanh(sigmoid(g0) * relu(g1)) + c) * tanh(sigmoid(g2) + relu(g3))
    return tanh(c * tanh(tanh(tanh(g4) * sigmoid(g5)) + sigmoid(tanh(g6) + sigmoid(g7)))), c


@cell(gates={"z": "x", "g": "xh"}, states=("h",))
def star(z: Any, g: Any, h: Any) -> Any:
    return tanh(h + sigmoid(g) * (tanh(z) - h))


@cell(gates={"n": "xh", "z": "xh"}, states=("h",))
def ugrnn(n: Any, z: Any, h: Any) -> Any:
    n = tanh(n)
    return n + sigmoid(z) * (h - n)


def _usual(own: Any, *others: Any, bias: Any = 0.0) -> tuple[Any, ...]:
    """Return the weights that most cells have, `bias` added to that of x, and others. A number is for all units."""
    vectors = [torch.as_tensor(a, dtype=own.weight_ih.dtype) for a in others]
    others = tuple([a.expand(own.hidden_size) if a.dim() == 0 else a for a in vectors])
    return own.weight_ih, own.weight_hh, own.bias_ih + bias, own.bias_hh, *others


def _of_mgu(own: Any) -> tuple[Any, ...]:
    (weight, product), (bias, last) = own.weight_hh.chunk(2), own.bias_hh.chunk(2)
    return own.weight_ih, weight, own.bias_ih + pad(last, (len(bias), 0)), bias, product


def _of_multiplicative(own: Any) -> tuple[Any, ...]:
    return _usual(own, *own.weight_mh.chunk(4), bias=pad(own.bias_mh, (len(own.bias_hh), 0)))


KINDS: dict[str, tuple[Cell, Callable[[Any], tuple[Any, ...]]]] = {
    "JANET": (janet, lambda own: _usual(own, own.beta)),
    "LiGRU": (li_gru, _usual),
    "LightRU": (light_ru, _usual),
    "MGU": (mgu, _of_mgu),
    "MultiplicativeLSTM": (multiplicative_lstm, _of_multiplicative),
    "NAS": (nas, _usual),
    "PeepholeLSTM": (peephole_lstm, lambda own: _usual(own, *own.weight_ph.chunk(3))),
    "STAR": (star, _usual),
    "UGRNN": (ugrnn, _usual),
    "coRNN": (cornn, lambda own: _usual(own, own.dt, own.gamma, own.epsilon, own.weight_ch, bias=own.bias_ch)),
}


def _unlike(module: Any) -> str:
    """Return what keeps a layer as it is: activations, where its class lets them be chosen."""
    with torch.random.fork_rng(devices=[]):  # the initial weights of `plain` draw no numbers of the caller's
        plain = type(module)(1, 1)
    own, usual = ([type(child) for child in each.cells[0].children()] for each in (module, plain))
    return "" if own == usual else "it has other activations than its class by default"


def _run(module: Any, inp: Tensor, state: Any = None) -> Any:
    """Do what `forward` of a layer does."""
    kind, weights = KINDS[type(module).__name__]
    given = (state,) if isinstance(state, Tensor) else state or ()
    if inp.dim() != 3 or not takes(inp, *given, *module.parameters()):
        return None
    x = inp.transpose(0, 1) if module.batch_first else inp
    shape, last = (module.num_layers, x.shape[1], module.hidden_size), []
    if any(a.shape != shape for a in given) or len(given) not in (0, len(kind.states)):
        return None
    for n, own in enumerate(module.cells):
        result = run_cell(kind, x, weights(own), tuple([a[n] for a in given]))
        x = result.h
        if module.dropout_layer is not None and n < module.num_layers - 1:
            x = module.dropout_layer(x)
        last.append(result.last)
    states = tuple([torch.stack(each) for each in zip(*last)])
    return x.transpose(0, 1) if module.batch_first else x, states if len(states) > 1 else states[0]


_places = Places(__name__, *(Place("torchrecurrent", kind, "torchrecurrent", "0.2", _run, _unlike) for kind in KINDS))
accelerate, restore = _places.accelerate, _places.restore
