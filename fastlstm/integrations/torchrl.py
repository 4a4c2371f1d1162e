"""TorchRL: its modules `LSTMModule` and `GRUModule` run rollouts by one call with resets, in recurrent mode on the CPU.

TorchRL's own code cuts a rollout into episodes, and then runs fastlstm's layers, for more than one layer or direction,
an episode that begins with other states than zeros, tensors in place of a tensordict, and under a compiler.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.integrations.places import Place, Places
from fastlstm.layers.recurrent import Recurrent


def _layer(module: Any) -> Any:
    return module.lstm if hasattr(module, "lstm") else module.gru


def _in_python(module: Any) -> str:
    """Return what keeps a module as it is."""
    return "" if isinstance(_layer(module), nn.LSTM | nn.GRU | Recurrent) else "it has python_based=True"


def _run(module: Any, tensordict: Any) -> Any:
    """Do what `forward` of a module does: write the output (*, T, H), and the states (*, T, 1, H), which are zeros
    except at the last steps of episodes.
    """
    if isinstance(tensordict, Tensor | None) or not module.recurrent_mode or torch.compiler.is_compiling():
        return None
    layer = _layer(module)
    x, *states = (tensordict.get(key, None) for key in module.in_keys[: len(module.out_keys)])
    first = [a for a in states if a is not None]
    if x is None or len(first) not in (0, len(states)) or tensordict.ndim == 0 or not x.is_cpu:
        return None
    if not isinstance(layer, Recurrent) or layer.num_layers > 1 or layer.bidirectional or layer.proj_size:
        return None
    rows, T = tensordict.shape[:-1], tensordict.shape[-1]
    later = tensordict["is_init"].reshape(-1, T)[:, 1:]  # a first step begins with the states that it has
    first = [a.reshape(-1, *a.shape[-3:]) for a in first]  # (B, T, 1, H)
    if not later.any() or any(a.requires_grad or a[:, 1:][later].any() for a in first):
        return None
    edge = later.new_ones(len(later), 1)
    hx = tuple([a[:, 0].transpose(0, 1) for a in first])
    options = {"return_cells": True} if len(states) == 2 else {}
    x = x.reshape(-1, T, x.shape[-1])
    reset = torch.cat([~edge, later], 1)
    output, _, *cells = layer(x, (hx if len(hx) == 2 else hx[0]) if hx else None, reset=reset, **options)
    ends = torch.cat([later, edge], 1).unsqueeze(2)
    last = [torch.where(ends, a, 0).unflatten(2, (1, -1)) for a in (output, *cells)]
    for key, value in zip(module.out_keys, (output, *last), strict=True):
        tensordict.set(key, value.reshape(*rows, *value.shape[1:]))
    return tensordict


_RNN = "torchrl.modules.tensordict_module.rnn"
_kinds = [Place(_RNN, name, "torchrl", "0.14", _run, _in_python) for name in ("LSTMModule", "GRUModule")]
_places = Places(__name__, *_kinds)
accelerate, restore = _places.accelerate, _places.restore
