"""rsl_rl: its recurrent models learn from episodes of unequal lengths:

    runner = rsl_rl.runners.OnPolicyRunner(environment, config)
    for model in (runner.alg.actor, runner.alg.critic):
        fastlstm.integrations.rsl_rl.accelerate(model)

rsl_rl cuts a rollout into the parts of its episodes, and pads these with zeros. After `accelerate` the kernels run each
part to its own length, and no padding. An `RNNModel` is exported to TorchScript with torch's own layers. If yours is of
a derived class, `restore` it before you export it.

`accelerate` and `restore` are those of `fastlstm.integrations.places.Places`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastlstm import convert
from fastlstm.integrations import import_library
from fastlstm.integrations.places import Place, Places, takes
from fastlstm.layers.recurrent import Recurrent


def _run(module: Any, input: Tensor, masks: Tensor | None = None, hidden_state: Any = None) -> Tensor | None:  # noqa: A002
    """Do what `forward` of an `RNN` does."""
    if masks is None or hidden_state is None or torch.compiler.is_compiling() or not takes(input):
        return None
    if not isinstance(module.rnn, Recurrent):
        return None
    output, _ = module.rnn(input, hidden_state, lengths=masks.sum(0))
    return import_library("rsl_rl.utils", *_RELEASE).unpad_trajectories(output, masks)


def _as_jit(model: Any) -> nn.Module:
    """Do what `as_jit` of an `RNNModel` does: return what TorchScript compiles, which are torch's layers alone."""
    library = import_library("rsl_rl.models.rnn_model", *_RELEASE)
    return convert.restore(library.RNNModel.as_jit(model))


_RELEASE = "rsl-rl-lib", "5.0"
_places = Places(
    __name__,
    Place("rsl_rl.modules.rnn", "RNN", *_RELEASE, _run),
    Place("rsl_rl.models.rnn_model", "RNNModel", *_RELEASE, _as_jit, method="as_jit"),
)
accelerate, restore, __getattr__ = _places.accelerate, _places.restore, _places.named
