"""Recurrent cells from their elementwise forward arithmetic: everything else is derived.

`cell` declares one. The functions that a cell may call are here, and so are the cells of the library:

    from fastlstm.cells import sigmoid, tanh
    print(fastlstm.cells.gru.derived())
"""

from fastlstm.cells.functions import exp, log_sigmoid, maximum, relu, sigmoid, stop_gradient, tanh, where
from fastlstm.cells.library import (
    CELLS,
    cifg,
    elman_relu,
    elman_tanh,
    gru,
    ind_rnn,
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
    "elman_relu",
    "elman_tanh",
    "exp",
    "gru",
    "ind_rnn",
    "li_gru",
    "log_sigmoid",
    "lstm",
    "maximum",
    "mgu",
    "peephole_lstm",
    "relu",
    "sigmoid",
    "slstm",
    "stop_gradient",
    "tanh",
    "where",
]
