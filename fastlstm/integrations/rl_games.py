"""rl_games: its recurrent networks learn from sequences in which episodes end:

    class Accelerates(rl_games.common.algo_observer.DefaultAlgoObserver):
        def after_init(self, algo):
            super().after_init(algo)
            fastlstm.integrations.rl_games.accelerate(algo.model)

    runner = rl_games.torch_runner.Runner(Accelerates())

Where an episode of any environment ends inside a minibatch, rl_games cuts all of its sequences, and runs the parts one
after the other. After `accelerate` one call with `reset` runs the sequences as they are. The code of rl_games still
takes a minibatch of one sequence, in which it sees no end of an episode, layers of two directions, and calls under a
compiler. It then runs fastlstm's layers.

`accelerate` and `restore` are those of `fastlstm.integrations.places.Places`.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.integrations.places import Place, Places, run_with_resets, takes
from fastlstm.layers.recurrent import Recurrent


def _run(module: Any, input: Tensor, states: Any, done_masks: Tensor | None = None, bptt_len: int = 0) -> Any:  # noqa: A002
    """Do what `forward` of an `LSTMWithDones` or a `GRUWithDones` does."""
    if done_masks is None or input.shape[1] == 1 or torch.compiler.is_compiling() or not takes(input):
        return None
    layer = module.rnn
    if not isinstance(layer, Recurrent) or layer.bidirectional or layer.batch_first:
        return None
    return run_with_resets(layer, input, states, done_masks.reshape(input.shape[:2]))


_RECURRENT = "rl_games.common.layers.recurrent"
_places = Places(
    __name__, *[Place(_RECURRENT, name, "rl_games", "1.6", _run) for name in ("LSTMWithDones", "GRUWithDones")]
)
accelerate, restore, __getattr__ = _places.accelerate, _places.restore, _places.named
