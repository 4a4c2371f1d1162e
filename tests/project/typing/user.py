# pyright: basic, reportUnnecessaryTypeIgnoreComment=true
"""A user's program, for type checkers alone: test_typing.py hands it to them, and nobody runs it.

A line that ends in `type: ignore` is one that they have to refuse: they report such a comment where it is not needed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import fastlstm
import fastlstm.integrations.benchmarl
import fastlstm.integrations.keras
import fastlstm.integrations.ncps
import fastlstm.integrations.rl_games
import fastlstm.integrations.rsl_rl
import fastlstm.integrations.sb3
import fastlstm.integrations.spiking
import fastlstm.integrations.torchrecurrent
import fastlstm.integrations.torchrl
import fastlstm.integrations.xlstm
from fastlstm import cells, convert
from fastlstm.backends import pool, settings
from fastlstm.export import model_bytes

State = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastlstm.LSTM(3, 5, 2, batch_first=True, backend="numba-bf16")
        self.cell = fastlstm.LSTMCell(5, 5, backend=None)

    def forward(self, x: Tensor) -> Tensor:
        output, (h, c) = self.lstm(x)
        h, c = self.cell(output[:, -1], (h[-1], c[-1]))
        return h


def whole_sequences(lstm: fastlstm.LSTM, x: Tensor, state: State, packed: PackedSequence, flag: bool) -> None:
    output, (h, c) = lstm(x)
    assert_type(output, Tensor)
    assert_type(h, Tensor)
    assert_type(c, Tensor)
    assert_type(lstm(input=x, hx=state), tuple[Tensor, State])
    assert_type(lstm(x, None, return_cells=False), tuple[Tensor, State])
    assert_type(lstm(x, return_cells=True), tuple[Tensor, State, Tensor])
    assert_type(lstm(x, return_cells=flag), tuple[Any, ...])
    assert_type(lstm(packed, state), tuple[PackedSequence, State])
    assert_type(lstm(packed, return_cells=True), tuple[PackedSequence, State, PackedSequence])
    assert_type(lstm(packed if flag else x), tuple[Any, ...])
    assert_type(lstm.forward(x), tuple[Tensor, State])
    assert_type(lstm(nn.Parameter(x)), tuple[Tensor, State])
    lstm(np.zeros((4, 2, 3)))  # type: ignore[call-overload]
    lstm(x, h)  # type: ignore[call-overload]
    lstm(x, foo=1)  # type: ignore[call-overload]
    output, state = lstm(x, return_cells=True)  # type: ignore[misc]


def masks(lstm: fastlstm.LSTM, x: Tensor) -> None:
    lstm(x, reset=torch.zeros(4, 2, dtype=torch.bool), lengths=torch.tensor([4, 2]))
    lstm(x, lengths=[4, 2])
    lstm(x, lengths=(4, 2))
    lstm(x, lengths=np.array([4, 2]))
    lstm(x[:, 0], lengths=4)
    lstm(x, lengths=[1.5, 2.0])  # type: ignore[list-item]
    lstm(x, lengths="42")  # type: ignore[arg-type]
    lstm(x, reset=[[True, False], [False, False]])
    lstm(x, reset="starts")  # type: ignore[arg-type]


def steps(lstm: fastlstm.LSTM, cell: fastlstm.LSTMCell, x: Tensor, state: State) -> None:
    h, state = lstm.step(x)
    assert_type(h, Tensor)
    assert_type(lstm.step(x, state), tuple[Tensor, State])
    assert_type(cell(x), State)
    assert_type(cell(input=x, hx=state), State)
    lstm.step(np.zeros(3))  # type: ignore[arg-type]
    cell(np.zeros(3))  # type: ignore[arg-type]


def other_modules(x: Tensor, h: Tensor, packed: PackedSequence, flag: bool) -> None:
    gru, elman = fastlstm.GRU(3, 5, zoneout=0.1, recurrent_dropout=0.2), fastlstm.Elman(3, 5, nonlinearity="relu")
    assert_type(gru(x), tuple[Tensor, Tensor])
    assert_type(gru(input=x, hx=h, lengths=[4, 2]), tuple[Tensor, Tensor])
    assert_type(gru(packed, h), tuple[PackedSequence, Tensor])
    assert_type(gru.forward(x), tuple[Tensor, Tensor])
    assert_type(elman(x, reset=torch.zeros(4, 2, dtype=torch.bool)), tuple[Tensor, Tensor])
    assert_type(elman(packed), tuple[PackedSequence, Tensor])
    assert_type(gru.step(x), tuple[Tensor, Tensor])
    assert_type(elman.step(x, h), tuple[Tensor, Tensor])
    assert_type(fastlstm.GRUCell(3, 5)(x, h), Tensor)
    assert_type(fastlstm.ElmanCell(3, 5, True, "relu")(x), Tensor)
    assert_type(fastlstm.GRU.from_torch(nn.GRU(3, 5)).to_torch(), nn.GRU)
    assert_type(fastlstm.Elman.from_torch(nn.RNN(3, 5)).to_torch(), nn.RNN)
    gru(x, (h, h))  # type: ignore[call-overload]
    gru(packed, lengths=[4, 2])  # type: ignore[call-overload]
    elman(np.zeros((4, 2, 3)))  # type: ignore[call-overload]
    gru.backend = "cudnn"  # type: ignore[assignment]
    fastlstm.GRU(3, 5, proj_size=2)  # type: ignore[arg-type]
    fastlstm.GRU(3, 5, zoneout=(0.1, 0.2))  # type: ignore[arg-type]
    fastlstm.LSTM(3, 5, zoneout=(0.1, 0.2))


def any_cell(x: Tensor, h: Tensor, packed: PackedSequence, flag: bool) -> None:
    rnn = fastlstm.RNN(fastlstm.cells.peephole_lstm, 3, 5, backend="numba")
    output, (h, c) = rnn(x)
    assert_type(output, Tensor)
    assert_type(c, Tensor)
    assert_type(rnn(x, (h, h), {"mask": x}), tuple[Tensor, tuple[Tensor, ...]])
    assert_type(rnn(packed, return_states=True), tuple[PackedSequence, tuple[Tensor, ...], tuple[PackedSequence, ...]])
    assert_type(rnn(x, return_states=flag), tuple[Any, ...])
    assert_type(rnn.step(x, (h, h)), tuple[Tensor, tuple[Tensor, ...]])
    assert_type(rnn(x, h), tuple[Tensor, tuple[Tensor, ...]])
    assert_type(rnn.step(x, h), tuple[Tensor, tuple[Tensor, ...]])
    rnn(x, {"h": h})  # type: ignore[call-overload]
    rnn(x, inputs=x)  # type: ignore[call-overload]
    fastlstm.RNN(nn.LSTM, 3, 5)  # type: ignore[arg-type]


@fastlstm.cell(gates={"i": "xh", "n": "xh"}, states=("h",), params={"gain": 1.0}, products=("w",))
def own(i: Any, n: Any, h: Any, gain: Any, w: Any) -> Any:
    i = (
        cells.sigmoid(cells.layer_norm(i, weight=gain))
        + cells.hard_sigmoid(cells.rms_norm(i))
        - cells.mean(i, of="head")
    )
    n = cells.tanh(n) + cells.relu(n) + cells.exp(cells.clamp(n, -1.0, 1.0)) + cells.softplus(n) + w(h)
    i = cells.maximum(i, cells.minimum(n, cells.log_sigmoid(cells.stop_gradient(n))))
    i = i + cells.log(cells.square(n) + 1.0) + cells.sqrt(cells.rsqrt(cells.square(n) + 1.0))
    return cells.where(i > n, cells.surrogate(i, n), h)


@cells.cell(gates={"g": "xh"}, states=("h",))
def small(g: Any, h: Any) -> Any:
    return cells.tanh(g) + h


def library(x: Tensor) -> None:
    assert_type(own, fastlstm.Cell)
    assert_type(small, cells.Cell)
    lstms = [cells.lstm, cells.peephole_lstm, cells.cifg, cells.multiplicative_lstm, cells.min_lstm, cells.slstm]
    grus = [cells.gru, cells.gru_reset_before, cells.mgu, cells.li_gru, cells.min_gru, cells.lem, cells.cfc]
    normalized = [cells.layer_norm_lstm, cells.layer_norm_gru, cells.dreamer_gru]
    plain = [cells.elman_tanh, cells.elman_relu, cells.ind_rnn, cells.rhn(3), cells.cornn]
    neurons = [cells.lif, cells.synaptic, cells.alif]
    for each in (*lstms, *grus, *normalized, *plain, *neurons, *cells.CELLS):
        assert_type(each, cells.Cell)
    assert_type(own.arguments, dict[str, str])
    print(own.derived(), own.layout, small(x, x))


def functions(x: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], flag: bool) -> None:
    output, (h, c) = fastlstm.lstm(x, None, *weights)
    assert_type(output, Tensor)
    assert_type(h, Tensor)
    assert_type(fastlstm.lstm(x, (h, c), *weights, lengths=None, reverse=True, backend="numba"), tuple[Tensor, State])
    assert_type(fastlstm.lstm(x, None, *weights, return_cells=True), tuple[Tensor, State, Tensor])
    either = fastlstm.lstm(x, None, *weights, return_cells=flag)
    assert_type(either, tuple[Tensor, State] | tuple[Tensor, State, Tensor])
    h, c = fastlstm.lstm_cell(x, (h, c), *weights, backend="reference")
    assert_type(h, Tensor)
    fastlstm.lstm(x, None, *weights, slot=None)  # type: ignore[call-overload]
    fastlstm.lstm(x, None, *weights, holds=False)  # type: ignore[call-overload]
    fastlstm.lstm(x, None, *weights, backend="nativ")  # type: ignore[call-overload]
    fastlstm.lstm_cell(x, None, *weights, slot=None)  # type: ignore[call-arg]
    fastlstm.lstm_cell(x, None, *weights, backend="nativ")  # type: ignore[arg-type]


def models() -> None:
    model = fastlstm.replace_lstm(Tagger(), backend="native", keep_type=True)
    assert_type(model, Tagger)
    assert_type(fastlstm.restore_lstm(model), Tagger)
    assert_type(fastlstm.restore(fastlstm.replace(model, backend="native")), Tagger)
    assert_type(fastlstm.LSTM.from_torch(nn.LSTM(3, 5)).to_torch(), nn.LSTM)
    model.lstm.backend = "triton"
    model.lstm.backend = "cudnn"  # type: ignore[assignment]
    fastlstm.LSTM(3, 5, backend="cudnn")  # type: ignore[arg-type]
    fastlstm.LSTMCell(3, 5, backend="cudnn")  # type: ignore[arg-type]
    fastlstm.replace_lstm(model, backend="cudnn")  # type: ignore[arg-type]
    fastlstm.replace_lstm([model])  # type: ignore[type-var]
    for of_kind in (convert.keras_weights, convert.keras_gru_weights):
        assert_type(of_kind(np.zeros((3, 20)), np.zeros((5, 20)), np.zeros(20), suffix=""), dict[str, Tensor])
    assert_type(convert.tensorflow_weights(np.zeros((8, 20)), np.zeros(20)), dict[str, Tensor])
    assert_type(model_bytes(model.state_dict(), int8=True), bytes)


def integrations(model: Any, x: Tensor) -> None:
    fastlstm.integrations.keras.enable()
    fastlstm.integrations.keras.disable()
    assert_type(fastlstm.integrations.benchmarl.restore(fastlstm.integrations.benchmarl.accelerate(Tagger())), Tagger)
    assert_type(fastlstm.integrations.ncps.restore(fastlstm.integrations.ncps.accelerate(Tagger())), Tagger)
    assert_type(fastlstm.integrations.rl_games.restore(fastlstm.integrations.rl_games.accelerate(Tagger())), Tagger)
    assert_type(fastlstm.integrations.rsl_rl.restore(fastlstm.integrations.rsl_rl.accelerate(Tagger())), Tagger)
    assert_type(fastlstm.integrations.sb3.restore(fastlstm.integrations.sb3.accelerate(model)), Any)
    assert_type(fastlstm.integrations.spiking.restore(fastlstm.integrations.spiking.accelerate(Tagger())), Tagger)
    assert_type(fastlstm.integrations.spiking.over_time(model, x, None), State)
    assert_type(fastlstm.integrations.torchrl.restore(fastlstm.integrations.torchrl.accelerate(Tagger())), Tagger)
    assert_type(fastlstm.integrations.xlstm.restore(fastlstm.integrations.xlstm.accelerate(Tagger())), Tagger)
    recurrent = fastlstm.integrations.torchrecurrent
    assert_type(recurrent.restore(recurrent.accelerate(Tagger())), Tagger)


def int8(x: Tensor, state: State) -> None:
    assert_type(fastlstm.quantize(Tagger(), "int16", exclude=["cell"]), Tagger)
    lstm = fastlstm.quantize(nn.LSTM(3, 5))
    assert_type(lstm, fastlstm.QuantizedLSTM)
    assert_type(lstm(x, state), tuple[Tensor, State])
    assert_type(fastlstm.quantize(fastlstm.LSTM(3, 5)), fastlstm.QuantizedLSTM)
    assert_type(fastlstm.quantize(fastlstm.GRU(3, 5)), fastlstm.QuantizedGRU)
    assert_type(fastlstm.quantize(nn.LSTMCell(3, 5)), fastlstm.QuantizedLSTMCell)
    assert_type(fastlstm.quantize(fastlstm.GRUCell(3, 5)), fastlstm.QuantizedGRUCell)
    assert_type(fastlstm.dequantize(lstm), fastlstm.LSTM)
    assert_type(fastlstm.dequantize(Tagger()), Tagger)
    q, scale = fastlstm.quantize_weight(x)
    assert_type(q, Tensor)
    assert_type(scale, Tensor)
    fastlstm.quantize(Tagger(), "int4")  # type: ignore[call-overload]


def streams(lstm: fastlstm.LSTM, x: Tensor) -> None:
    stream = lstm.stream(batch_size=4)
    assert_type(stream, fastlstm.Stream)
    assert_type(stream(x), Tensor)
    h, state = stream.step(x, stream.state)
    assert_type(h, Tensor)
    stream.state = state
    stream.reset([0])


def several(x: Tensor, lstm: fastlstm.LSTM) -> None:
    fastlstm.Ensemble([lstm, fastlstm.LSTM(3, 5)])(x)
    nn.utils.parametrize.register_parametrization(lstm, "weight_hh_l0", nn.Dropout(0.5))
    assert_type(fastlstm.info(), dict[str, Any])
    with fastlstm.patch(backend="numba"), fastlstm.batch_invariant():
        lstm(x)
    fastlstm.patch(backend="cudnn")  # type: ignore[arg-type]
    fastlstm.unpatch()
    with fastlstm.patch_operators():
        lstm(x)
    fastlstm.unpatch_operators()
    pool.forget()
    assert_type(settings.NAMES, tuple[str, ...])


@fastlstm.use_backend("native")
def decorated(count: int) -> str:
    return "a" * count


def backends() -> None:
    fastlstm.use_backend("triton-tf32")
    with fastlstm.use_backend("auto"):
        assert_type(decorated(3), str)
    decorated("3")  # type: ignore[arg-type]
    fastlstm.use_backend("nativ")  # type: ignore[arg-type]


assert_type(fastlstm.__version__, str)
