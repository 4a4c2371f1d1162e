"""The cells, as their papers write them."""

from typing import Any

from fastlstm.cells.functions import exp, layer_norm, log_sigmoid, maximum, relu, sigmoid, tanh
from fastlstm.cells.spec import cell


@cell(gates={"i": "xh", "f": "xh", "g": "xh", "o": "xh"}, states=("h", "c"))
def lstm(i: Any, f: Any, g: Any, o: Any, c: Any) -> Any:
    """Long short-term memory with a forget gate: `torch.nn.LSTM`.

    Hochreiter and Schmidhuber, Long short-term memory, 1997; Gers, Schmidhuber and Cummins, Learning to forget, 2000.
    """
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return o * tanh(c), c


@cell(gates={"r": "xh", "z": "xh", "n_x": "x", "n_h": "h"}, states=("h",))
def gru(r: Any, z: Any, n_x: Any, n_h: Any, h: Any) -> Any:
    """The gated recurrent unit, with the reset gate after the product: `torch.nn.GRU`.

    Cho et al., Learning phrase representations using RNN encoder-decoder, 2014.
    """
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n_x + r * n_h)
    return n + z * (h - n)


@cell(gates={"a": "xh"}, states=("h",))
def elman_tanh(a: Any) -> Any:
    """The simple recurrent network: `torch.nn.RNN`. Elman, Finding structure in time, 1990."""
    return tanh(a)


@cell(gates={"a": "xh"}, states=("h",))
def elman_relu(a: Any) -> Any:
    """The simple recurrent network of rectified units: `torch.nn.RNN` with ``nonlinearity="relu"``.

    Le, Jaitly and Hinton, A simple way to initialize recurrent networks of rectified linear units, 2015.
    """
    return relu(a)


@cell(gates={"i": "xh", "f": "xh", "g": "xh", "o": "xh"}, states=("h", "c"), params=("p_i", "p_f", "p_o"))
def peephole_lstm(i: Any, f: Any, g: Any, o: Any, c: Any, p_i: Any, p_f: Any, p_o: Any) -> Any:
    """The LSTM whose gates see the cell state. Gers and Schmidhuber, Recurrent nets that time and count, 2000."""
    i, f, g = sigmoid(i + p_i * c), sigmoid(f + p_f * c), tanh(g)
    c = f * c + i * g
    o = sigmoid(o + p_o * c)
    return o * tanh(c), c


@cell(gates={"f": "xh", "g": "xh", "o": "xh"}, states=("h", "c"))
def cifg(f: Any, g: Any, o: Any, c: Any) -> Any:
    """The LSTM with coupled gates: its input gate is 1 - f. Greff et al., LSTM: a search space odyssey, 2015."""
    f, g, o = sigmoid(f), tanh(g), sigmoid(o)
    c = g + f * (c - g)
    return o * tanh(c), c


@cell(gates={"f": "xh", "n_x": "x", "n_h": "h"}, states=("h",))
def mgu(f: Any, n_x: Any, n_h: Any, h: Any) -> Any:
    """The minimal gated unit, its gate after the product, as in `gru`.

    Zhou et al., Minimal gated unit for recurrent neural networks, 2016.
    """
    f = sigmoid(f)
    n = tanh(n_x + f * n_h)
    return h + f * (n - h)


@cell(gates={"z": "xh", "n": "xh"}, states=("h",))
def li_gru(z: Any, n: Any, h: Any) -> Any:
    """The light GRU: no reset gate, rectified units. The batch normalization of x's products is the caller's.

    Ravanelli et al., Light gated recurrent units for speech recognition, 2018.
    """
    z, n = sigmoid(z), relu(n)
    return n + z * (h - n)


@cell(gates={"a": "x"}, states=("h",), params=("u",))
def ind_rnn(a: Any, h: Any, u: Any) -> Any:
    """Independent units: each has one recurrent weight, u, and there is no weight_hh.

    Li et al., Independently recurrent neural network, 2018.
    """
    return relu(a + u * h)


@cell(gates={"z": "xh", "i": "xh", "f": "xh", "o": "xh"}, states=("h", "c", "n", "m"))
def slstm(z: Any, i: Any, f: Any, o: Any, c: Any, n: Any, m: Any) -> Any:
    """The sLSTM: an exponential input gate, the sigmoid's forget gate, a normalizer n and a stabilizer m.

    The states c and n are to be multiplied by exp(m), which cancels in the output. Initial states are zeros.

    Beck et al., xLSTM: extended long short-term memory, 2024.
    """
    z, o, f_log = tanh(z), sigmoid(o), log_sigmoid(f) + m
    m = maximum(f_log, i)
    i, f = exp(i - m), exp(f_log - m)
    c, n = f * c + i * z, f * n + i
    return o * c / n, c, n, m


def _norms(gains: str, biases: str) -> dict[str, float]:
    """Return the initial values of norms' params: 1 for the names in `gains`, and 0 for those in `biases`."""
    return dict.fromkeys(gains.split(), 1.0) | dict.fromkeys(biases.split(), 0.0)


@cell(
    gates={**dict.fromkeys(("i_x", "f_x", "g_x", "o_x"), "x"), **dict.fromkeys(("i_h", "f_h", "g_h", "o_h"), "h")},
    states=("h", "c"),
    params=_norms(
        "gain_i_x gain_f_x gain_g_x gain_o_x gain_i_h gain_f_h gain_g_h gain_o_h gain_c",
        "bias_i bias_f bias_g bias_o bias_c",
    ),
)
def layer_norm_lstm(
    i_x, f_x, g_x, o_x, i_h, f_h, g_h, o_h, c, gain_i_x, gain_f_x, gain_g_x, gain_o_x, gain_i_h, gain_f_h, gain_g_h,
    gain_o_h, gain_c, bias_i, bias_f, bias_g, bias_o, bias_c,
):  # fmt: skip
    """The LSTM with three layer normalizations: of the product with x and of that with h, each over all four gates, and
    of the cell state on its way out. The paper's products have no biases, which is ``bias=False``. Its three biases of
    a gate are one here, their sum.

    Ba, Kiros and Hinton, Layer normalization, 2016.
    """
    x = layer_norm(i_x, f_x, g_x, o_x, weight=(gain_i_x, gain_f_x, gain_g_x, gain_o_x))
    h = layer_norm(i_h, f_h, g_h, o_h, weight=(gain_i_h, gain_f_h, gain_g_h, gain_o_h))
    i, f, g, o = (a + b + bias for a, b, bias in zip(x, h, (bias_i, bias_f, bias_g, bias_o)))
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return o * tanh(layer_norm(c, weight=gain_c, bias=bias_c)), c


@cell(
    gates={"r_x": "x", "z_x": "x", "n_x": "x", "r_h": "h", "z_h": "h", "n_h": "h"},
    states=("h",),
    params=_norms("gain_r_x gain_z_x gain_n_x gain_r_h gain_z_h gain_n_h", "bias_r bias_z bias_n_x bias_n_h"),
)
def layer_norm_gru(
    r_x, z_x, n_x, r_h, z_h, n_h, h, gain_r_x, gain_z_x, gain_n_x, gain_r_h, gain_z_h, gain_n_h, bias_r, bias_z,
    bias_n_x, bias_n_h,
):  # fmt: skip
    """The GRU with four layer normalizations: of the product with x and of that with h, each over both gates and apart
    over the candidate. z lets the candidate in, where `gru` has 1 - z. The paper's products have no biases, which is
    ``bias=False``. Its two biases of a gate are one here, their sum.

    Ba, Kiros and Hinton, Layer normalization, 2016.
    """
    r_x, z_x = layer_norm(r_x, z_x, weight=(gain_r_x, gain_z_x))
    r_h, z_h = layer_norm(r_h, z_h, weight=(gain_r_h, gain_z_h))
    n_x, n_h = layer_norm(n_x, weight=gain_n_x, bias=bias_n_x), layer_norm(n_h, weight=gain_n_h, bias=bias_n_h)
    r, z = sigmoid(r_x + r_h + bias_r), sigmoid(z_x + z_h + bias_z)
    n = tanh(n_x + r * n_h)
    return h + z * (n - h)


@cell(
    gates={"r": "xh", "n": "xh", "u": "xh"},
    states=("h",),
    params=_norms("gain_r gain_n gain_u", "bias_r bias_n bias_u"),
)
def dreamer_gru(r, n, u, h, gain_r, gain_n, gain_u, bias_r, bias_n, bias_u):
    """The recurrent model of DreamerV2 and V3: one layer normalization over all three gates, the reset gate after the
    product, and an update gate that starts out closed. V3's products have no biases, which is ``bias=False``.

    Hafner, Lillicrap, Norouzi and Ba, Mastering Atari with discrete world models, 2021.
    """
    r, n, u = layer_norm(r, n, u, weight=(gain_r, gain_n, gain_u), bias=(bias_r, bias_n, bias_u), eps=1e-3)
    r, u = sigmoid(r), sigmoid(u - 1.0)
    n = tanh(r * n)
    return h + u * (n - h)


CELLS = (
    lstm, gru, elman_tanh, elman_relu, peephole_lstm, cifg, mgu, li_gru, ind_rnn, slstm, layer_norm_lstm,
    layer_norm_gru, dreamer_gru,
)  # fmt: skip
