"""Recurrent cells from their forward arithmetic: everything else is derived.

`cell` declares one. The functions that a cell may call are here, and so are the cells of the library:

    from fastlstm.cells import sigmoid, tanh
    print(fastlstm.cells.gru.derived())
"""

from fastlstm.cells.functions import (
    abs,  # noqa: A004, F401  # Python's own
    clamp,
    exp,
    hard_sigmoid,
    layer_norm,
    log,
    log_sigmoid,
    maximum,
    mean,
    minimum,
    relu,
    rms_norm,
    rsqrt,
    sigmoid,
    softplus,
    sqrt,
    square,
    stop_gradient,
    tanh,
    where,
)
from fastlstm.cells.library import (
    CELLS,
    cifg,
    dreamer_gru,
    elman_relu,
    elman_tanh,
    gru,
    ind_rnn,
    layer_norm_gru,
    layer_norm_lstm,
    li_gru,
    lstm,
    mgu,
    peephole_lstm,
    slstm,
)
from fastlstm.cells.spec import Cell, cell

__all__ = [
    "CELLS",
    "Cell",
    "cell",
    "cifg",
    "clamp",
    "dreamer_gru",
    "elman_relu",
    "elman_tanh",
    "exp",
    "gru",
    "hard_sigmoid",
    "ind_rnn",
    "layer_norm",
    "layer_norm_gru",
    "layer_norm_lstm",
    "li_gru",
    "log",
    "log_sigmoid",
    "lstm",
    "maximum",
    "mean",
    "mgu",
    "minimum",
    "peephole_lstm",
    "relu",
    "rms_norm",
    "rsqrt",
    "sigmoid",
    "slstm",
    "softplus",
    "sqrt",
    "square",
    "stop_gradient",
    "tanh",
    "where",
]
