"""`LSTM` and `LSTMCell`: the parameters, arguments, results and errors of `torch.nn.LSTM` and `torch.nn.LSTMCell`."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastlstm.backends import settings
from fastlstm.backends.settings import Backend
from fastlstm.cells import Cell, library
from fastlstm.layers import checks
from fastlstm.layers.functional import State
from fastlstm.layers.like_torch import InPlaceOf
from fastlstm.layers.modules import Words
from fastlstm.layers.packing import Lengths, Resets
from fastlstm.layers.recurrent_cell import RecurrentCell
from fastlstm.layers.regularized import Regularized
from fastlstm.layers.typed import X, typed_as


class LSTM(Regularized[State], InPlaceOf[nn.LSTM]):
    """A multi-layer LSTM that takes the place of `torch.nn.LSTM`.

    Equivalent to ``torch.nn.LSTM(input_size, hidden_size, ...)``: the same arguments, parameters, initial values for
    the same seed, state_dict, results and errors. The differences:

    * ``isinstance(module, torch.nn.LSTM)`` is false, since `torch.compile` refuses modules for which it is true. The
      base class is `torch.nn.RNNBase`.
    * The weights are read from the module's attributes at every call. So parametrizations, `functional_call` and plain
      tensors in a weight's place work. Calls without gradients may keep a packed copy of the weights. Every call that
      uses the copy compares it with all weights, so that no change is missed.
    * An input of no time steps gives an empty output and the state unchanged. Initial states may have any strides.
      A PackedSequence and its states are checked as a tensor and its states are.
    * `forward` also takes resets and lengths and can return all cell states. `step` runs one time step.

    Args:
        input_size: I, the number of input features.
        hidden_size: H, the number of hidden units.
        num_layers: L, layers stacked on each other.
        bias: with False there are no ``bias_ih_l*`` and ``bias_hh_l*``.
        batch_first: input and output are (B, T, ...) instead of (T, B, ...); states are (D*L, B, ...) all the same.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: each layer also runs from the last step to the first (D = 2, otherwise 1).
        proj_size: P > 0 projects the hidden state to P features with ``weight_hr_l*``.
        device, dtype: of the parameters.
        backend: a name of `fastlstm.backends.settings.NAMES`. None takes the default that `fastlstm.use_backend` sets.
        recompute: whether the backward pass computes the gates of a long sequence again, a hundred steps and more at a
            time, instead of reading them from memory: see `fastlstm.layers.recompute`.
        forget_bias: initial bias of the forget gate in ``bias_ih``; ``bias_hh`` then gets zeros there. With None both
            are drawn like the other biases.
        recurrent_dropout: probability of dropout on the hidden state before it is multiplied by ``weight_hh_l*``, with
            one mask for a whole sequence: see `fastlstm.layers.regularized`.
        zoneout: probability with which a unit keeps its state from the step before, of both states or as a pair of
            those of c and h: see `fastlstm.layers.regularized`.

    Parameters of layer k, with row blocks in the order i, f, g, o:
        ``weight_ih_l{k}`` (4H, I) or (4H, D*H_out) for k > 0, ``weight_hh_l{k}`` (4H, H_out), ``bias_ih_l{k}`` and
        ``bias_hh_l{k}`` (4H,), and with projection ``weight_hr_l{k}`` (P, H). H_out is P with projection, otherwise H.
        A bidirectional layer has each of them again, with ``_reverse`` at the end of the name.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, as `torch.nn.LSTM` does; for an unknown
            backend; for a forget_bias without biases; for a recurrent_dropout or zoneout that is no probability, or
            beside a projection.
    """

    _theirs = nn.LSTM
    _words = Words(
        "LSTM",
        "LSTM: Expected input to be 2D or 3D, got {}D instead",
        states="hx and cx",
        number="lstm expects two hidden states",
    )
    forget_bias: float | None = None

    @property
    def _cell(self) -> Cell:
        return library.lstm_projected if self.proj_size else library.lstm

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: Backend | None = None,
        recompute: bool = False,
        forget_bias: float | None = None,
        recurrent_dropout: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
    ) -> None:
        options = bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        super().__init__("LSTM", input_size, hidden_size, num_layers, *options)
        self._set_backend(backend)
        self.recompute = recompute
        self.recurrent_dropout, self.zoneout = recurrent_dropout, zoneout
        if forget_bias is not None:
            self.forget_bias = checks.check_forget_bias(forget_bias, bias)
            self._set_forget_bias()  # also in a subclass whose reset_parameters, which has run, does not

    def reset_parameters(self) -> None:
        """Draw the parameters again from uniform(-1/sqrt(H), 1/sqrt(H)), and apply `forget_bias` if it is given."""
        super().reset_parameters()
        self._set_forget_bias()

    @torch.no_grad()
    def _set_forget_bias(self) -> None:
        if self.forget_bias is None:
            return
        forget = slice(self.hidden_size, 2 * self.hidden_size)
        for _, _, bias_ih, bias_hh, *_ in self.all_weights:
            bias_ih[forget] = self.forget_bias
            bias_hh[forget] = 0

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", forget_bias={self.forget_bias}" if self.forget_bias is not None else "")

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    @overload
    def forward(
        self,
        input: X,
        hx: State | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[X, State]: ...
    @overload
    def forward(
        self,
        input: X,
        hx: State | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_cells: Literal[True],
    ) -> tuple[X, State, X]: ...
    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: State | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """Run all layers over whole sequences.

        Args:
            input: (T, B, I); (B, T, I) with batch_first; (T, I) for one sequence alone; a PackedSequence; or a
                nested tensor (B, j, I) of the layout torch.jagged.
            hx: ``h_0`` (D*L, B, H_out) and ``c_0`` (D*L, B, H), without B for one sequence alone; None for zeros.
            reset: boolean (T, B), (B, T) with batch_first, (T,) for one sequence alone: a tensor, a list, or an array.
                The states are zero before the steps that are True, and gradients stop there. Equivalent to running the
                pieces apart. Modules of one direction only. True past a row's end, which `lengths` says, has no effect.
            lengths: integer (B,), or () for one sequence alone, in any order: a tensor on any device, a list, or an
                array. Row b ends after lengths[b] steps. Outputs past the end are zero, ``h_n`` and ``c_n`` are the
                states at the end, and the reverse direction starts there. Equivalent to a PackedSequence.
                Lengths below 0 or beyond T raise if they can be read. They cannot be read on a GPU, while a graph is
                traced, or under torch.func; there they are clamped to 0..T.
            return_cells: also return the cell states of the last layer.

        Returns:
            output (T, B, D*H_out) of the last layer in the form of `input`, ``(h_n, c_n)`` of the sizes of `hx`, and
            with `return_cells` the cell states (T, B, D*H) in the form of `input`. Past a row's end these repeat the
            cell state at the end.

        Raises:
            ValueError: for the number of dimensions or dtype of `input`, the shape of `reset` or `lengths`, a length
                below 0 or beyond T, `reset` in a bidirectional module, `reset` or `lengths` with a PackedSequence or a
                nested tensor; for a nested tensor of another layout or axes.
            RuntimeError: for other sizes, dtypes and devices, and from a backend asked for by name that cannot run.
            TypeError: for `input`, `hx`, `reset` or `lengths` of the wrong type.

        Equivalent to `torch.nn.LSTM.forward`.
        """
        if return_cells is not False:
            settings.check_bool("return_cells", return_cells)
        return self._forward(input, hx, reset, lengths, return_cells)

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class LSTMCell(RecurrentCell[State]):
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
