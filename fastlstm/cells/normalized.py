"""The cells with norms, as their papers write them."""

from fastlstm.cells.functions import layer_norm, sigmoid, tanh
from fastlstm.cells.spec import cell


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
    of the cell state on its way out. The paper's products have no biases, which is ``bias=False``; its three biases of
    a gate are one here, their sum. Ba, Kiros and Hinton, Layer normalization, 2016.
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
    over the candidate. z lets the candidate in, where `gru` has 1 - z. The paper is that of `layer_norm_lstm`, and its
    products have no biases, which is ``bias=False``. Its two biases of a gate are one here, their sum.
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
    product, and an update gate that starts out closed. V3's products have no biases, which is ``bias=False``. Hafner,
    Lillicrap, Norouzi and Ba, Mastering Atari with discrete world models, 2021.
    """
    r, n, u = layer_norm(r, n, u, weight=(gain_r, gain_n, gain_u), bias=(bias_r, bias_n, bias_u), eps=1e-3)
    r, u = sigmoid(r), sigmoid(u - 1.0)
    n = tanh(r * n)
    return h + u * (n - h)
