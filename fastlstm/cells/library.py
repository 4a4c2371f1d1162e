"""The cells, as their papers write them; those with norms are in `normalized`, spiking neurons in `neurons`."""

import functools
import inspect
from typing import Any

from fastlstm.cells.functions import exp, log_sigmoid, maximum, relu, sigmoid, tanh
from fastlstm.cells.neurons import alif, lif, synaptic
from fastlstm.cells.normalized import dreamer_gru, layer_norm_gru, layer_norm_lstm
from fastlstm.cells.spec import Cell, cell


@cell(gates={"i": "xh", "f": "xh", "g": "xh", "o": "xh"}, states=("h", "c"))
def lstm(i: Any, f: Any, g: Any, o: Any, c: Any) -> Any:
    """Long short-term memory with a forget gate: `torch.nn.LSTM`. Hochreiter and Schmidhuber, Long short-term memory,
    1997; Gers, Schmidhuber and Cummins, Learning to forget, 2000.
    """
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return o * tanh(c), c


@cell(gates={"i": "xh", "f": "xh", "g": "xh", "o": "xh"}, states=("h", "c"), products=("hr",))
def lstm_projected(i: Any, f: Any, g: Any, o: Any, c: Any, hr: Any) -> Any:
    """The LSTM whose output a matrix projects to fewer units: `torch.nn.LSTM` with `proj_size`. Sak, Senior and
    Beaufays, Long short-term memory based recurrent neural network architectures for large vocabulary speech
    recognition, 2014.
    """
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return hr(o * tanh(c)), c


@cell(gates={"r": "xh", "z": "xh", "n_x": "x", "n_h": "h"}, states=("h",))
def gru(r: Any, z: Any, n_x: Any, n_h: Any, h: Any) -> Any:
    """The gated recurrent unit, with the reset gate after the product: `torch.nn.GRU`. Cho et al., Learning phrase
    representations using RNN encoder-decoder, 2014.
    """
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n_x + r * n_h)
    return n + z * (h - n)


@cell(gates={"r": "xh", "z": "xh", "n": "x"}, states=("h",), products=("n_h",))
def gru_reset_before(r: Any, z: Any, n: Any, h: Any, n_h: Any) -> Any:
    """The gated recurrent unit of `gru`'s paper, with the reset gate before the product: Keras's GRU with
    ``reset_after=False``, and ONNX's with ``linear_before_reset=0``.
    """
    r, z = sigmoid(r), sigmoid(z)
    n = tanh(n + n_h(r * h))
    return n + z * (h - n)


@cell(gates={"a": "xh"}, states=("h",))
def elman_tanh(a: Any) -> Any:
    """The simple recurrent network: `torch.nn.RNN`. Elman, Finding structure in time, 1990."""
    return tanh(a)


@cell(gates={"a": "xh"}, states=("h",))
def elman_relu(a: Any) -> Any:
    """The simple recurrent network of rectified units: `torch.nn.RNN` with ``nonlinearity="relu"``. Le, Jaitly and
    Hinton, A simple way to initialize recurrent networks of rectified linear units, 2015.
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
    """The minimal gated unit, its gate after the product, as in `gru`. Zhou et al., Minimal gated unit for recurrent
    neural networks, 2016.
    """
    f = sigmoid(f)
    n = tanh(n_x + f * n_h)
    return h + f * (n - h)


@cell(gates={"z": "xh", "n": "xh"}, states=("h",))
def li_gru(z: Any, n: Any, h: Any) -> Any:
    """The light GRU: no reset gate, rectified units. The batch normalization of x's products is the caller's. Ravanelli
    et al., Light gated recurrent units for speech recognition, 2018.
    """
    z, n = sigmoid(z), relu(n)
    return n + z * (h - n)


@cell(gates={"z": "x", "n": "x"}, states=("h",))
def min_gru(z: Any, n: Any, h: Any) -> Any:
    """The minimal GRU, whose gate and candidate see x alone. z lets the candidate in, where `gru` has 1 - z. Feng et
    al., Were RNNs all we needed?, 2024.
    """
    return h + sigmoid(z) * (n - h)


@cell(gates={"f": "x", "i": "x", "n": "x"}, states=("h",))
def min_lstm(f: Any, i: Any, n: Any, h: Any) -> Any:
    """The minimal LSTM of `min_gru`'s paper, whose gates see x alone, and which divides each of them by their sum."""
    f = sigmoid(log_sigmoid(f) - log_sigmoid(i))  # the share of sigmoid(f), without a quotient of zeros
    return n + f * (h - n)


@cell(gates={"a": "x"}, states=("h",), params=("u",))
def ind_rnn(a: Any, h: Any, u: Any) -> Any:
    """Independent units: each has one recurrent weight, u, and there is no weight_hh. Li et al., Independently
    recurrent neural network, 2018.
    """
    return relu(a + u * h)


@cell(gates={"z": "xh", "i": "xh", "f": "xh", "o": "xh"}, states=("h", "c", "n", "m"))
def slstm(z: Any, i: Any, f: Any, o: Any, c: Any, n: Any, m: Any) -> Any:
    """The sLSTM: an exponential input gate, the sigmoid's forget gate, a normalizer n and a stabilizer m. The states c
    and n are to be multiplied by exp(m), which cancels in the output. Initial states are zeros. Beck et al., xLSTM:
    extended long short-term memory, 2024.
    """
    z, o, f_log = tanh(z), sigmoid(o), log_sigmoid(f) + m
    m = maximum(f_log, i)
    i, f = exp(i - m), exp(f_log - m)
    c, n = f * c + i * z, f * n + i
    return o * c / n, c, n, m


@cell(
    gates={"m_x": "x", "m_h": "h", "i": "x", "f": "x", "g": "x", "o": "x"},
    states=("h", "c"),
    products=("i_m", "f_m", "g_m", "o_m"),
)
def multiplicative_lstm(
    m_x: Any, m_h: Any, i: Any, f: Any, g: Any, o: Any, c: Any, i_m: Any, f_m: Any, g_m: Any, o_m: Any
) -> Any:
    """The multiplicative LSTM, mLSTM: its gates see, instead of h, a product of x times a product of h. The paper's two
    products have no biases. The candidate g has a tanh, and the output gate multiplies tanh(c), as in OpenAI's
    sentiment neuron and in torchrecurrent; others leave the candidate linear, and return tanh(o * c). xLSTM's mLSTM is
    another.

    Krause, Lu, Murray and Renals, Multiplicative LSTM for sequence modelling, 2016.
    """
    m = m_x * m_h
    i, f, g, o = sigmoid(i + i_m(m)), sigmoid(f + f_m(m)), tanh(g + g_m(m)), sigmoid(o + o_m(m))
    c = f * c + i * g
    return o * tanh(c), c


@cell(gates={"step_y": "xh", "step_z": "xh", "z_y": "xh", "y_x": "x"}, states=("y", "z"), products=("y_z",))
def lem(step_y: Any, step_z: Any, z_y: Any, y_x: Any, y: Any, z: Any, y_z: Any) -> Any:
    """Long expressive memory: two states, each with a learned step through time, at most 1. Rusch, Mishra, Erichson and
    Mahoney, Long expressive memory for sequence modeling, 2022.
    """
    z = z + sigmoid(step_z) * (tanh(z_y) - z)
    return y + sigmoid(step_y) * (tanh(y_x + y_z(z)) - y), z


@cell(gates={"a": "xh"}, states=("y", "z"), products=("a_z",), params={"dt": 0.042, "gamma": 2.7, "epsilon": 4.7})
def cornn(a: Any, y: Any, z: Any, a_z: Any, dt: Any, gamma: Any, epsilon: Any) -> Any:
    """The coupled oscillatory network: a position y and a velocity z for each unit. ``dt``, ``gamma`` and ``epsilon``
    are three numbers in the paper: give them no gradient, as by ``rnn.dt_l0.requires_grad_(False)``. Rusch and Mishra,
    Coupled oscillatory recurrent neural network (coRNN), 2021.
    """
    z = z + dt * (tanh(a + a_z(z)) - gamma * y - epsilon * z)
    return y + dt * z, z


@functools.cache
def rhn(depth: int) -> Cell:
    """Return the cell of a recurrent highway network of this depth: as many highway layers in each step.

    Layer 1 sees x and h, and has the gates n and t. Each later layer k has the products ``n_k`` and ``t_k`` with the
    state that layer k - 1 leaves, and their biases as params ``bias_n_k`` and ``bias_t_k``. The paper starts all biases
    of t between -2 and -4. A process that loads an export of such a cell has to call this function before.

    Raises:
        TypeError: for a depth that is no int.
        ValueError: for a depth below 1.

    Zilly, Srivastava, Koutník and Schmidhuber, Recurrent highway networks, 2017.
    """
    if isinstance(depth, bool) or not isinstance(depth, int):
        raise TypeError(f"depth must be an int, got {type(depth).__name__}")
    if depth < 1:
        raise ValueError(f"depth must be 1 or more, got {depth}")
    products = tuple(f"{gate}_{k}" for k in range(2, depth + 1) for gate in "nt")
    biases = tuple(f"bias_{name}" for name in products)

    def step(**values: Any) -> Any:
        n, t, h = values["n"], values["t"], values["h"]
        for k in range(1, depth + 1):
            if k > 1:
                n, t = (values[f"{gate}_{k}"](h) + values[f"bias_{gate}_{k}"] for gate in "nt")
            h = h + sigmoid(t) * (tanh(n) - h)
        return h

    step.__name__ = step.__qualname__ = f"rhn_{depth}"
    names = "n", "t", "h", *products, *biases
    step.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # for the names that it takes
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    return cell(gates={"n": "xh", "t": "xh"}, states=("h",), products=products, params=biases)(step)


def __getattr__(name: str) -> Cell:
    """Return the cell that `rhn` makes under this name, by which a pickle refers to it."""
    kind, _, depth = name.partition("_")
    if kind == "rhn" and depth.isdecimal() and int(depth) > 0:
        return rhn(int(depth))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cell(gates={"f_1": "xh", "f_2": "xh", "time_a": "xh", "time_b": "xh"}, states=("h",), inputs=("gap",))
def cfc(f_1: Any, f_2: Any, time_a: Any, time_b: Any, gap: Any) -> Any:
    """The closed-form continuous-time network, without a backbone: ``ncps.torch.CfC`` with ``backbone_layers=0``. The
    input ``gap`` is the time between two steps, and 1 where they are regular. Hasani et al., Closed-form
    continuous-time neural networks, 2022.
    """
    f_1, f_2 = tanh(f_1), tanh(f_2)
    return f_1 + sigmoid(time_a * gap + time_b) * (f_2 - f_1)


CELLS = (
    lstm, gru, gru_reset_before, elman_tanh, elman_relu, peephole_lstm, cifg, mgu, li_gru, min_gru, min_lstm, ind_rnn,
    slstm, multiplicative_lstm, lem, cornn, rhn(2), cfc, layer_norm_lstm, layer_norm_gru, dreamer_gru, lif, synaptic,
    alif,
)  # fmt: skip
