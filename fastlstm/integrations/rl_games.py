"""rl_games: its recurrent networks learn from sequences in which episodes end by one call with `reset`.

The code of rl_games still takes a minibatch of one sequence, in which it sees no end of an episode, layers of two
directions, and calls under a compiler. It then runs fastlstm's layers.
"""

from typing import Any

import torch
from torch import Tensor

from fastlstm.integrations.calls import run_with_resets, takes
from fastlstm.integrations.places import Place, Places
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
_kinds = [Place(_RECURRENT, f"{name}WithDones", "rl_games", "1.6", _run) for name in ("LSTM", "GRU")]
_places = Places(__name__, *_kinds)
accelerate, restore = _places.accelerate, _places.restore
