"""LSTM layers faster than ``torch.nn.LSTM``: fused kernels behind the same interface."""

from fastlstm.backends.dispatch import use_backend
from fastlstm.convert import replace_lstm, restore_lstm
from fastlstm.layers.functional import lstm, lstm_cell
from fastlstm.layers.lstm import LSTM
from fastlstm.layers.lstm_cell import LSTMCell

__all__ = ["LSTM", "LSTMCell", "lstm", "lstm_cell", "replace_lstm", "restore_lstm", "use_backend"]
__version__ = "0.1.0"


def __dir__() -> list[str]:
    return ["__version__", *__all__]
