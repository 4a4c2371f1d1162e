"""`LSTMCell`: the parameters, arguments, results and errors of `torch.nn.LSTMCell`."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastlstm.backends.settings import Backend
from fastlstm.cells import Cell, library
from fastlstm.layers.functional import State
from fastlstm.layers.modules import Words
from fastlstm.layers.recurrent_cell import RecurrentCell


class LSTMCell(RecurrentCell):
    """An LSTM cell that takes the place of `torch.nn.LSTMCell`.

    Equivalent to ``torch.nn.LSTMCell(input_size, hidden_size, bias)``: the same arguments, parameters, initial values
    for the same seed, state_dict, results and errors.

    Args:
        input_size: I, the number of input features.
        hidden_size: H, the number of hidden units.
        bias: with False, ``bias_ih`` and ``bias_hh`` are None.
        device, dtype: of the parameters.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `fastlstm.use_backend` sets.

    Parameters, with row blocks in the order i, f, g, o: ``weight_ih`` (4H, I), ``weight_hh`` (4H, H), ``bias_ih`` and
    ``bias_hh`` (4H,).

    Raises:
        ValueError: for an unknown backend.
    """

    _words = Words(
        "LSTMCell",
        "LSTMCell: Expected input to be 1D or 2D, got {}D instead",
        number="lstm_cell expects two hidden states",
    )

    @property
    def _cell(self) -> Cell:
        return library.lstm

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        self._set_backend(backend)

    def forward(self, input: Tensor, hx: State | None = None) -> State:  # noqa: A002
        """Run one time step.

        Args:
            input: (B, I), or (I,) for one row alone.
            hx: ``h_0`` and ``c_0``, each (B, H) or (H,); None for zeros.

        Returns:
            ``(h_1, c_1)``, each (B, H) or (H,).

        Raises:
            ValueError: for a number of dimensions other than 1 and 2.
            RuntimeError: for other sizes, dtypes and devices, and from a backend asked for by name that cannot run.
            TypeError: if `input` is no tensor, or `hx` is no tuple or list of tensors.

        Equivalent to `torch.nn.LSTMCell.forward`.
        """
        state: State = self._forward(input, hx)
        return state

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        def __call__(self, input: Tensor, hx: State | None = None) -> State: ...  # noqa: A002
