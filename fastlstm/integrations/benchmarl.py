"""BenchMARL: its models `Lstm` and `Gru` learn from rollouts by one call for all steps and all agents.

BenchMARL's own code runs dropout between layers, calls under a compiler, and single steps, of which the collection of
data consists. `accelerate` and `restore` also take a `benchmarl.experiment.Experiment`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.backends.base import Layer
from fastlstm.call import run
from fastlstm.cells import library
from fastlstm.integrations.calls import takes
from fastlstm.integrations.places import Place, Places


def _models_of(experiment: Any) -> Any:
    """Return the models that learn. A loss of TorchRL has them as attributes that are no submodules of it."""
    if not hasattr(experiment, "losses"):
        return experiment
    losses = experiment.losses.values()
    return nn.ModuleList([model for loss in losses for model in vars(loss).values() if isinstance(model, nn.Module)])


def _run(stack: Any, x: Tensor, is_init: Tensor, *states: Tensor) -> Any:
    """Do what `forward` of a stack of LSTM or GRU cells does: x has the shape (B, T, I), `is_init` (B, T, 1), and each
    of the states (B, L, H).
    """
    drops = stack.dropout and stack.training and stack.n_layers > 1
    if x.dim() != 3 or x.shape[1] == 1 or drops or torch.compiler.is_compiling():
        return None
    if not takes(x, *states, *stack.parameters()):
        return None
    cell, layers = (library.lstm, stack.lstms) if len(states) == 2 else (library.gru, stack.grus)
    x, reset, last = x.transpose(0, 1), is_init.squeeze(-1).transpose(0, 1), []
    for n, layer in enumerate(layers):
        weights = layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh
        first = tuple([state.select(-2, n) for state in states])
        result = run(Layer(x, weights, first, None, reset, False, cell), plans=None)
        x = result.h
        last.append(result.last)
    return x.transpose(0, 1), *[torch.stack(each, -2) for each in zip(*last)]


_kinds = [Place(f"benchmarl.models.{name.lower()}", name, "benchmarl", "1.5", _run) for name in ("LSTM", "GRU")]
_places = Places(__name__, *_kinds, within=_models_of)
accelerate, restore = _places.accelerate, _places.restore
