"""`GRU` and `GRUCell`: the parameters, arguments, results and errors of `torch.nn.GRU` and `torch.nn.GRUCell`."""

from typing import TYPE_CHECKING, Any, overload

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm.backends.settings import Backend
from fastlstm.cells import Cell, library
from fastlstm.layers import checks
from fastlstm.layers.modules import Words
from fastlstm.layers.packing import Lengths
from fastlstm.layers.recurrent_cell import RecurrentCell
from fastlstm.layers.regularized import Regularized

if TYPE_CHECKING:
    from fastlstm.layers.typed import typed_as


class GRU(Regularized):
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

    _single = True
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

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, reset: Tensor | None = None, lengths: Lengths | None = None
    ) -> tuple[Tensor, Tensor]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, reset: None = None, lengths: None = None
    ) -> tuple[PackedSequence, Tensor]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[Any, Tensor]:
        """Run all layers over whole sequences.

        Args:
            input: (T, B, I); (B, T, I) with batch_first; (T, I) for one sequence alone; or a PackedSequence.
            hx: ``h_0`` (D*L, B, H), without B for one sequence alone; None for zeros.
            reset: boolean (T, B), (B, T) with batch_first, (T,) for one sequence alone. The states are zero before the
                steps that are True, and gradients stop there. Modules of one direction only. Steps past a row's end
                are not reset.
            lengths: integer (B,), or () for one sequence alone, in any order: a tensor on any device, a list, or an
                array. Row b ends after lengths[b] steps. Outputs past the end are zero, ``h_n`` is the state at the
                end, and the reverse direction starts there. Equivalent to a PackedSequence. Lengths that cannot be read
                are clamped to 0..T, as in `fastlstm.LSTM.forward`.

        Returns:
            output (T, B, D*H) of the last layer in the form of `input`, and ``h_n`` of the size of `hx`.

        Raises:
            ValueError: for the number of dimensions or dtype of `input`, the shape of `reset` or `lengths`, a length
                below 0 or beyond T, `reset` in a bidirectional module, `reset` or `lengths` with a PackedSequence.
            RuntimeError: for other sizes, dtypes and devices, and from a backend asked for by name that cannot run.
            TypeError: for `input`, `hx`, `reset` or `lengths` of the wrong type.

        Equivalent to `torch.nn.GRU.forward`.
        """
        output, h_n = self._forward(input, hx, reset, lengths)
        return output, h_n

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def step(self, x_t: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run one time step through all layers, for streaming. Modules of one direction only.

        Args:
            x_t: (B, I), or (I,) for one sequence alone.
            state: h (L, B, H), without B for one sequence alone; None for zeros.

        Returns:
            h_t (B, H) of the last layer, and the new state, in the form of `state`.

        Raises:
            ValueError: for a bidirectional module, and for the number of dimensions or dtype of `x_t`.
            TypeError: if `x_t` or `state` is no tensor.
            RuntimeError: for other sizes, dtypes and devices, as in `forward`; for recurrent_dropout in training mode.

        Equivalent to `forward` with T = 1.
        """
        return self._step(x_t, state)

    @classmethod
    def from_torch(cls, module: nn.GRU) -> "GRU":
        """Return a GRU with the arguments, mode, hooks and the very parameters of `module`, which stays as it is.

        Raises:
            TypeError: if `module` is no plain `torch.nn.GRU`. `fastlstm.replace` takes subclasses and parametrized
                modules.
        """
        new: GRU = cls._from_torch(module, nn.GRU)
        return new

    def to_torch(self) -> nn.GRU:
        """Return a `torch.nn.GRU` with the arguments, mode, hooks and the very parameters of this module.

        Raises:
            TypeError: if this module is parametrized or of a subclass. `fastlstm.restore` takes those.
        """
        new: nn.GRU = self._to_torch(GRU, nn.GRU)
        return new


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

    _single = True
    _words = Words("GRUCell", "GRUCell: Expected input to be 1D or 2D, got {}D instead")

    @property
    def _cell(self) -> Cell:
        return library.gru
