"""`GRU` and `GRUCell`: the parameters, arguments, results and errors of `torch.nn.GRU` and `torch.nn.GRUCell`."""

from typing import Any

from torch import Tensor, nn

from fastlstm.backends.settings import Backend
from fastlstm.cells import Cell, library
from fastlstm.cells.hints import checked_by
from fastlstm.layers import checks
from fastlstm.layers.like_torch import InPlaceOf
from fastlstm.layers.modules import Words
from fastlstm.layers.recurrent_cell import RecurrentCell
from fastlstm.layers.regularized import Regularized


class GRU(Regularized[Tensor], InPlaceOf[nn.GRU]):
    """A multi-layer GRU that takes the place of `torch.nn.GRU`.

    Equivalent to ``torch.nn.GRU(input_size, hidden_size, ...)``: the same arguments, parameters, initial values for the
    same seed, state_dict, results and errors. It differs from torch's class as `fastlstm.LSTM` does.

    Args:
        input_size: I, the number of input features.
        hidden_size: H, the number of hidden units.
        num_layers: L, layers stacked on each other.
        bias: with False there are no ``bias_ih_l*`` and ``bias_hh_l*``.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...); states are (D*L, B, H) all the same.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: each layer also runs from the last step to the first (D = 2, otherwise 1).
        device, dtype: of the parameters.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `fastlstm.use_backend` sets.
        recompute: whether the backward pass computes the gates of a long sequence again, a hundred steps and more at a
            time, instead of reading them from memory: see `fastlstm.layers.recompute`.
        proj_size: torch's error for it, since only LSTMs have projections.
        recurrent_dropout: probability of dropout on the hidden state before it is multiplied by ``weight_hh_l*``, with
            one mask for a whole sequence: see `fastlstm.layers.regularized`.
        zoneout: probability with which a unit keeps its state from the step before: see `fastlstm.layers.regularized`.

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

    @checked_by(checks.check_no_heads)
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
    for the same seed, state_dict, results and errors.

    Args:
        input_size: I, the number of input features.
        hidden_size: H, the number of hidden units.
        bias: with False, ``bias_ih`` and ``bias_hh`` are None.
        device, dtype: of the parameters.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `fastlstm.use_backend` sets.

    Parameters, with row blocks in the order r, z, n: ``weight_ih`` (3H, I), ``weight_hh`` (3H, H), ``bias_ih`` and
    ``bias_hh`` (3H,).

    Raises:
        ValueError: for an unknown backend.
    """

    _has_bare_state, _cell = True, GRU._cell
    _words = Words("GRUCell", "GRUCell: Expected input to be 1D or 2D, got {}D instead")
