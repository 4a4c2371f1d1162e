"""`GRU` and `GRUCell`: the parameters, arguments, results and errors of `torch.nn.GRU` and `torch.nn.GRUCell`."""

from typing import Any

from torch import Tensor, nn

from fastlstm.backends.settings import Backend
from fastlstm.cells import Cell, library
from fastlstm.layers import checks
from fastlstm.layers.like_torch import InPlaceOf
from fastlstm.layers.modules import Words
from fastlstm.layers.recurrent_cell import RecurrentCell
from fastlstm.layers.regularized import Regularized


class GRU(Regularized[Tensor], InPlaceOf[nn.GRU]):
    """A multi-layer GRU that takes the place of `torch.nn.GRU`.

    Equivalent to ``torch.nn.GRU(input_size, hidden_size, ...)``: the same arguments, parameters, initial values for the
    same seed, state_dict, results and errors. It differs from torch's class as `fastlstm.LSTM` does, and takes the same
    arguments but for ``forget_bias``. Its ``zoneout`` is one probability. A ``proj_size`` raises torch's error, since
    only LSTMs have projections.

    Parameters of layer k, with row blocks in the order r, z, n:
        ``weight_ih_l{k}`` (3H, I) or (3H, D*H) for k > 0, ``weight_hh_l{k}`` (3H, H), ``bias_ih_l{k}`` and
        ``bias_hh_l{k}`` (3H,). A bidirectional layer has each of them again, with ``_reverse`` at the end of the name.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, as `torch.nn.GRU` does; for an unknown
            backend; for a recurrent_dropout or zoneout that is no probability.
    """

    _has_bare_state, _theirs = True, nn.GRU
    _words = Words("GRU", "GRU: Expected input to be 2D or 3D, got {}D instead")

    @property
    def _cell(self) -> Cell:
        return library.gru

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: Backend | None = None,
        recompute: bool = False,
        proj_size: None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
    ) -> None:
        checks.check_no_projection(proj_size)
        options = bias, batch_first, dropout, bidirectional, 0, device, dtype
        super().__init__("GRU", input_size, hidden_size, num_layers, *options)
        self._set_backend(backend)
        self.recompute = recompute
        self.recurrent_dropout, self.zoneout = recurrent_dropout, zoneout


class GRUCell(RecurrentCell[Tensor]):
    """A GRU cell that takes the place of `torch.nn.GRUCell`.

    Equivalent to ``torch.nn.GRUCell(input_size, hidden_size, bias)``: the same arguments, parameters, initial values
    for the same seed, state_dict, results and errors. It takes the arguments of `fastlstm.LSTMCell`.

    Parameters, with row blocks in the order r, z, n: ``weight_ih`` (3H, I), ``weight_hh`` (3H, H), ``bias_ih`` and
    ``bias_hh`` (3H,).

    Raises:
        ValueError: for an unknown backend.
    """

    _has_bare_state, _cell = True, GRU._cell
    _words = Words("GRUCell", "GRUCell: Expected input to be 1D or 2D, got {}D instead")
