"""`QuantizedLSTM`, `QuantizedGRU` and their cells: modules for inference with weights of int8.

`fastlstm.quantize` makes them of a model's layers. `docs/quantize.md` says what they compute, and how fast.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.autograd import quantized
from fastlstm.backends.base import Layer
from fastlstm.layers import input_checks
from fastlstm.layers.functional import State
from fastlstm.layers.gru import GRU, GRUCell
from fastlstm.layers.int8 import BITS, Quantized
from fastlstm.layers.like_torch import LikeTorch
from fastlstm.layers.lstm import LSTM, LSTMCell
from fastlstm.layers.recompute import Results
from fastlstm.layers.recurrent_cell import RecurrentCell
from fastlstm.layers.typed import States


class QuantizedLayers(Quantized, LikeTorch[States]):
    """A stack of int8 layers, each in one or both directions."""

    _flat_weights_names: Any = ("_like",)  # torch's check of an input looks at the dtype of the first

    def _plan_for(self, layer: Layer, plans: Any) -> Any:
        if self._like.dtype is not torch.float32 or not self._is_float32(layer.x):
            return None
        return quantized.find(layer, BITS[self.activations], self.backend, plans)[1]

    def _run_layer(self, k: int, layer: Layer, weight_hr: Tensor | None, sequences: bool) -> Results:
        run = self._run_quantized(0 if self.num_layers == 1 and not self.bidirectional else k + 1, layer)
        return run.h, run.last, ()


class QuantizedCell(Quantized, RecurrentCell[States]):
    """An int8 cell."""

    def _forward(self, x: Any, hx: Any) -> Any:
        states = input_checks.check_cell(self, x, hx, self._like)
        rows = x if x.dim() == 2 else x.unsqueeze(0)
        given: tuple[Any, ...] = (None,) * len(self._cell.states)
        if states is not None:
            given = tuple([a.unsqueeze(0) if x.dim() == 2 else a.view(1, 1, -1) for a in states])
        layer = Layer(rows.unsqueeze(0), tuple(self._layer_weights(0)), given, None, None, False, self._cell)
        found = self._run_quantized(0, layer)
        last = tuple([a.view(self.hidden_size) if x.dim() == 1 else a.squeeze(0) for a in found.last])
        return last[0] if self._single else last


class QuantizedLSTM(QuantizedLayers[State]):
    """A `fastlstm.LSTM` for inference, with weights of int8. `fastlstm.quantize` makes it.

    It returns no cell states. The backward pass of its results raises RuntimeError.

    Buffers of layer k: ``weight_ih_l{k}`` and ``weight_hh_l{k}``, int8 in the shapes of `fastlstm.LSTM`'s parameters;
    ``weight_ih_l{k}_scale`` and ``weight_hh_l{k}_scale``, float32 (4H,); and ``bias_ih_l{k}`` and ``bias_hh_l{k}``,
    float32 (4H,). A bidirectional layer has each again, as ``weight_ih_l{k}_reverse`` and
    ``weight_ih_l{k}_reverse_scale``.
    """

    _float, _cell, _words = LSTM, LSTM._cell, LSTM._words
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden


class QuantizedGRU(QuantizedLayers[Tensor]):
    """A `fastlstm.GRU` for inference, with weights of int8. `fastlstm.quantize` makes it.

    Its buffers are those of `QuantizedLSTM`, with 3H rows instead of 4H. The backward pass of its results raises
    RuntimeError.
    """

    _float, _cell, _words, _single = GRU, GRU._cell, GRU._words, True


class QuantizedLSTMCell(QuantizedCell[State]):
    """A `fastlstm.LSTMCell` for inference, with weights of int8: ``weight_ih``, ``weight_ih_scale`` and so on."""

    _float, _cell, _words = LSTMCell, LSTMCell._cell, LSTMCell._words


class QuantizedGRUCell(QuantizedCell[Tensor]):
    """A `fastlstm.GRUCell` for inference, with weights of int8: ``weight_ih``, ``weight_ih_scale`` and so on."""

    _float, _cell, _words, _single = GRUCell, GRUCell._cell, GRUCell._words, True
