"""rsl_rl: its recurrent models run the parts of episodes each to its own length, and no padding.

An `RNNModel` is exported to TorchScript with torch's own layers. If yours is of a derived class, `restore` it before
you export it.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastlstm import convert
from fastlstm.integrations.calls import takes
from fastlstm.integrations.places import Place, Places
from fastlstm.layers.recurrent import Recurrent


def _run(module: Any, input: Tensor, masks: Tensor | None = None, hidden_state: Any = None) -> Tensor | None:  # noqa: A002
    """Do what `forward` of an `RNN` does."""
    if masks is None or hidden_state is None or not isinstance(module.rnn, Recurrent):
        return None
    if torch.compiler.is_compiling() or not takes(input):
        return None
    output, _ = module.rnn(input, hidden_state, lengths=masks.sum(0))
    return import_module("rsl_rl.utils").unpad_trajectories(output, masks)


def _as_jit(model: Any) -> nn.Module:
    """Do what `as_jit` of an `RNNModel` does: return what TorchScript compiles, which are torch's layers alone."""
    return convert.restore(import_module("rsl_rl.models.rnn_model").RNNModel.as_jit(model))


_places = Places(
    __name__,
    Place("rsl_rl.modules.rnn", "RNN", "rsl-rl-lib", "5.0", _run),
    Place("rsl_rl.models.rnn_model", "RNNModel", "rsl-rl-lib", "5.0", _as_jit, method="as_jit"),
)
accelerate, restore = _places.accelerate, _places.restore
