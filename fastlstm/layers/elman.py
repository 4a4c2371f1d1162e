"""`Elman` and `ElmanCell`: the parameters, arguments, results and errors of `torch.nn.RNN` and `torch.nn.RNNCell`."""

from typing import Any

from torch import Tensor, nn

from fastlstm.backends.settings import Backend
from fastlstm.cells import library
from fastlstm.cells.spec import Cell
from fastlstm.layers import checks
from fastlstm.layers.like_torch import InPlaceOf, LikeTorch
from fastlstm.layers.modules import Words
from fastlstm.layers.recurrent_cell import RecurrentCell


class Elman(LikeTorch[Tensor], InPlaceOf[nn.RNN]):
    """A multi-layer simple recurrent network that takes the place of `torch.nn.RNN`.

    Equivalent to ``torch.nn.RNN(input_size, hidden_size, ...)``: the same arguments, parameters, initial values for the
    same seed, state_dict, results and errors. It differs from torch's class as `fastlstm.LSTM` does.

    Args:
        nonlinearity: "tanh" or "relu", of the hidden units.

    The other arguments are those of `fastlstm.LSTM`, but for ``forget_bias``, ``recurrent_dropout`` and ``zoneout``. A
    ``proj_size`` raises torch's error, since only LSTMs have projections.

    Parameters of layer k, in one row block:
        ``weight_ih_l{k}`` (H, I) or (H, D*H) for k > 0, ``weight_hh_l{k}`` (H, H), ``bias_ih_l{k}`` and
        ``bias_hh_l{k}`` (H,). A bidirectional layer has each of them again, with ``_reverse`` at the end of the name.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, as `torch.nn.RNN` does; for an unknown
            nonlinearity or backend.
    """

    _has_bare_state, _theirs = True, nn.RNN
    _words = Words("Elman", "RNN: Expected input to be 2D or 3D, got {}D tensor instead")
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
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
    ) -> None:
        checks.check_no_projection(proj_size)
        options = bias, batch_first, dropout, bidirectional, 0, device, dtype
        self.nonlinearity = nonlinearity
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, *options)
        self._set_backend(backend)
        self.recompute = recompute

    @property
    def _cell(self) -> Cell:
        return library.elman_relu if self.mode == "RNN_RELU" else library.elman_tanh


class ElmanCell(RecurrentCell[Tensor]):
    """A cell of a simple recurrent network that takes the place of `torch.nn.RNNCell`.

    Equivalent to ``torch.nn.RNNCell(input_size, hidden_size, bias, nonlinearity)``: the same arguments, parameters,
    initial values for the same seed, state_dict, results and errors.

    Args:
        nonlinearity: "tanh" or "relu", of the hidden units.

    The other arguments are those of `fastlstm.LSTMCell`.

    Parameters: ``weight_ih`` (H, I), ``weight_hh`` (H, H), ``bias_ih`` and ``bias_hh`` (H,).

    Raises:
        ValueError: for an unknown backend.
    """

    __constants__ = nn.RNNCell.__constants__
    _has_bare_state = True
    _words = Words("RNNCell", "RNNCell: Expected input to be 1D or 2D, got {}D instead")
    nonlinearity: str = "tanh"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> Cell:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return library.elman_relu if self.nonlinearity == "relu" else library.elman_tanh
