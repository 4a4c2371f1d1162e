"""What the tests of int8 modules share."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import fastlstm

# those with kernels of their own, which an installation may lack
KERNELS = ["native"] if fastlstm.info()["backends"]["native"] is None else []
kernels = pytest.mark.parametrize("backend", KERNELS)
both_activations = pytest.mark.parametrize("activations", ["int8", "int16"])
both_kinds = pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU])


class Tagger(nn.Module):
    """Recurrent modules at several depths, one of them under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 3)
        self.encoder = nn.Sequential(nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True))
        self.decoder = nn.ModuleDict({"rnn": fastlstm.GRU(10, 6, batch_first=True), "cell": nn.LSTMCell(6, 6)})
        self.tied = self.encoder[0]

    def forward(self, x):
        output, _ = self.decoder["rnn"](self.tied(self.embed(x))[0])
        return self.decoder["cell"](output[:, -1])[0]


def quantized(module, activations="int8", backend=None):
    """An int8 copy of a module."""
    made = fastlstm.quantize(deepcopy(module), activations)
    made.backend = backend
    return made


def same_bits(a, b):
    """Whether tensors have the same bits. Any NaN counts as any other."""
    return all(
        torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num().view(torch.int32), y.nan_to_num().view(torch.int32))
        for x, y in zip(a, b, strict=True)
    )
