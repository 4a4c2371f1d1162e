"""The LSTM and the GRU with what a regulariser does to their states. The masks are inputs, drawn by a cell's caller.

A state ``s`` is the hidden state times a mask. It comes first where the product with weight_hh is of a masked hidden
state, and h, the output, is then the second state.
"""

from typing import Any

from fastlstm.cells.library import gru, lstm
from fastlstm.cells.spec import cell


@cell(gates=lstm.gates, states=("s", "h", "c"), inputs=("mask",))
def dropped_lstm(i: Any, f: Any, g: Any, o: Any, c: Any, mask: Any) -> Any:
    """The LSTM whose gates see a masked hidden state. Gal and Ghahramani, 2016, see `fastlstm.layers.regularized`."""
    h, c = lstm(i, f, g, o, c)
    return h * mask, h, c


@cell(gates=lstm.gates, states=("h", "c"), inputs=("keep_h", "keep_c"))
def zoneout_lstm(i: Any, f: Any, g: Any, o: Any, h: Any, c: Any, keep_h: Any, keep_c: Any) -> Any:
    """The LSTM that keeps parts of its states. Krueger et al., 2017, see `fastlstm.layers.regularized`."""
    h_new, c_new = lstm(i, f, g, o, c)
    return keep_h * h + (1 - keep_h) * h_new, keep_c * c + (1 - keep_c) * c_new


@cell(gates=lstm.gates, states=("s", "h", "c"), inputs=("mask", "keep_h", "keep_c"))
def dropped_zoneout_lstm(i: Any, f: Any, g: Any, o: Any, h: Any, c: Any, mask: Any, keep_h: Any, keep_c: Any) -> Any:
    """Both of `dropped_lstm` and `zoneout_lstm`."""
    h, c = zoneout_lstm(i, f, g, o, h, c, keep_h, keep_c)
    return h * mask, h, c


@cell(gates=gru.gates, states=("s", "h"), inputs=("mask",))
def dropped_gru(r: Any, z: Any, n_x: Any, n_h: Any, h: Any, mask: Any) -> Any:
    """The GRU whose gates see a masked hidden state, of which z keeps the unmasked one."""
    h = gru(r, z, n_x, n_h, h)
    return h * mask, h


@cell(gates=gru.gates, states=("h",), inputs=("keep_h",))
def zoneout_gru(r: Any, z: Any, n_x: Any, n_h: Any, h: Any, keep_h: Any) -> Any:
    """The GRU that keeps parts of its state."""
    return keep_h * h + (1 - keep_h) * gru(r, z, n_x, n_h, h)


@cell(gates=gru.gates, states=("s", "h"), inputs=("mask", "keep_h"))
def dropped_zoneout_gru(r: Any, z: Any, n_x: Any, n_h: Any, h: Any, mask: Any, keep_h: Any) -> Any:
    """Both of `dropped_gru` and `zoneout_gru`."""
    h = zoneout_gru(r, z, n_x, n_h, h, keep_h)
    return h * mask, h
