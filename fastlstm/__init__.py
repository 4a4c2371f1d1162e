"""Recurrent layers faster than torch's: fused kernels behind the interfaces of ``torch.nn.LSTM`` and its like."""

from fastlstm import cells
from fastlstm.backends.settings import batch_invariant, use_backend
from fastlstm.cells import Cell, cell
from fastlstm.convert import replace, replace_lstm, restore, restore_lstm
from fastlstm.info import info
from fastlstm.int8.definition import quantize_weight
from fastlstm.int8.modules import QuantizedGRU, QuantizedGRUCell, QuantizedLSTM, QuantizedLSTMCell
from fastlstm.int8.quantize import dequantize, quantize
from fastlstm.layers.elman import Elman, ElmanCell
from fastlstm.layers.ensemble import Ensemble
from fastlstm.layers.functional import lstm, lstm_cell
from fastlstm.layers.gru import GRU, GRUCell
from fastlstm.layers.lstm import LSTM, LSTMCell
from fastlstm.layers.rnn import RNN
from fastlstm.layers.streams import Stream
from fastlstm.operator_patching import patch_operators, unpatch_operators
from fastlstm.patching import patch, unpatch
from fastlstm.version import __version__ as __version__

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "Elman",
    "ElmanCell",
    "Ensemble",
    "GRUCell",
    "LSTMCell",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "Stream",
    "batch_invariant",
    "cell",
    "cells",
    "dequantize",
    "info",
    "lstm",
    "lstm_cell",
    "patch",
    "patch_operators",
    "quantize",
    "quantize_weight",
    "replace",
    "replace_lstm",
    "restore",
    "restore_lstm",
    "unpatch",
    "unpatch_operators",
    "use_backend",
]


def __dir__() -> list[str]:
    return ["__version__", *__all__]
