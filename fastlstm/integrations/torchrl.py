"""TorchRL: its modules `LSTMModule` and `GRUModule` run rollouts with resets.

Where an episode begins inside a rollout, TorchRL cuts all its tensors into episodes, pads these, runs them, and puts
the results together again. After `accelerate` one call with `reset` runs the rollout as it is.
"""

import warnings
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlstm import convert
from fastlstm.integrations import import_library
from fastlstm.layers.recurrent import Recurrent

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Make every `LSTMModule` and `GRUModule` of a model run fastlstm.

    Their layers become fastlstm's, as ``fastlstm.replace(model, keep_type=True)`` makes them. In recurrent mode on the
    CPU the steps at which ``is_init`` is true become resets. Parameters and keys stay, and so do results up to
    rounding. TorchRL's own code cuts a rollout into episodes, and then runs fastlstm's layers, in three cases: for more
    than one layer or direction, for an episode that begins with other states than zeros, and under a compiler.

    Args:
        model: any module, or one of the two itself. A module with ``python_based=True``, and one of a class derived
            from the two, stays as it is.

    Returns:
        `model`, changed. A UserWarning says if there was nothing to change.

    Raises:
        ImportError: without torchrl 0.14 or newer.
    """
    ours, changed = _classes(), False
    for module in model.modules():
        if type(module) in ours and isinstance(_layer(module), nn.LSTM | nn.GRU):
            convert.replace(_layer(module), keep_type=True)
            module.__class__, changed = ours[type(module)], True
        changed |= type(module) in ours.values()
    if not changed:
        warnings.warn(f"accelerate found no LSTMModule or GRUModule in the {type(model).__name__}", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: the modules and their layers have their own classes again. Return `model`.

    Raises:
        ImportError: without torchrl 0.14 or newer.
    """
    theirs = {ours: cls for cls, ours in _classes().items()}
    for module in model.modules():
        if type(module) in theirs:
            module.__class__ = theirs[type(module)]
            convert.restore(_layer(module))
    return model


@cache
def _classes() -> dict[type, type]:
    """Return the classes that take the places of TorchRL's."""
    theirs = import_library("torchrl.modules", "torchrl", "0.14")
    dispatch = import_library("tensordict.nn", "tensordict", "0.14").dispatch

    def with_resets(name: str) -> type:
        parent = getattr(theirs, name)

        @dispatch  # which makes a tensordict of tensors that are given by their keys
        def forward(self: Any, tensordict: Any) -> Any:
            in_rollouts = self.recurrent_mode and not torch.compiler.is_compiling()
            results = _run(self, tensordict) if in_rollouts else None
            if results is None:
                return parent.forward(self, tensordict)
            for key, value in zip(self.out_keys, results, strict=True):
                tensordict.set(key, value)
            return tensordict

        return type(name, (parent,), {"forward": forward, "__module__": __name__, "__doc__": parent.__doc__})

    return {getattr(theirs, name): with_resets(name) for name in ("LSTMModule", "GRUModule")}


def __getattr__(name: str) -> Any:
    """Return one of the classes above, by whose names pickles find them."""
    if name in ("LSTMModule", "GRUModule"):
        return next(cls for cls in _classes().values() if cls.__name__ == name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _layer(module: Any) -> Any:
    return module.lstm if hasattr(module, "lstm") else module.gru


def _run(module: Any, tensordict: Any) -> list[Tensor] | None:
    """Run a rollout in which episodes begin. Return None if the rollout is TorchRL's matter.

    Otherwise return the output (*, T, H), and the states (*, T, 1, H): zeros but at the last steps of episodes.
    """
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
    return [a.reshape(*rows, *a.shape[1:]) for a in (output, *last)]
