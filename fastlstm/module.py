"""`LSTM`: the parameters, arguments, results and errors of `torch.nn.LSTM`.

Layers, directions, dropout, packing and `batch_first` end here; below, everything is one layer, time first.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastlstm import checks, dispatch
from fastlstm.dispatch import Backend
from fastlstm.function import take_rows
from fastlstm.functional import State, run_layer
from fastlstm.inference import KeepsPacked, infer_both, plain_sequence, slot_of
from fastlstm.packing import Lengths, is_readable, longest_first, pack, pad, step_mask, tensor_of, unpack

X = TypeVar("X", Tensor, PackedSequence)  # outputs have the form of the input
if TYPE_CHECKING:
    Method = TypeVar("Method", bound=Callable[..., Any])

    def _typed_as(method: Method) -> Callable[[Any], Method]: ...


class LSTM(KeepsPacked, nn.RNNBase):
    """A multi-layer LSTM that takes the place of `torch.nn.LSTM`.

    Equivalent to ``torch.nn.LSTM(input_size, hidden_size, ...)``: the same arguments, parameters, initial values for
    the same seed, state_dict, results and errors. The differences:

    * ``isinstance(module, torch.nn.LSTM)`` is false (`torch.compile` refuses what passes that test); the base is
      `torch.nn.RNNBase`.
    * The weights are read from the module's attributes at every call: parametrizations, `torch.func.functional_call`
      and plain tensors in a weight's place all work. Calls without gradients keep them packed, and look
      at all of them again, so that no change is missed.
    * An input of no time steps gives an empty output and the state unchanged; initial states of any strides are taken;
      a PackedSequence and its states are checked as a tensor and its states are.
    * `forward` also takes resets and lengths and gives all cell states; `step` runs one time step.

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
        backend: which implementation runs, one of `fastlstm.dispatch.NAMES`; None takes `fastlstm.use_backend`'s.
        forget_bias: initial bias of the forget gate (in ``bias_ih``; ``bias_hh`` gets zeros); None: as the others.

    Parameters, for layer k, each again with ``_reverse`` where bidirectional, row blocks in the order i, f, g, o:
        ``weight_ih_l{k}`` (4H, I) or (4H, D*H_out) for k > 0, ``weight_hh_l{k}`` (4H, H_out), ``bias_ih_l{k}`` and
        ``bias_hh_l{k}`` (4H,), and with projection ``weight_hr_l{k}`` (P, H). H_out is P with projection, otherwise H.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, as `torch.nn.LSTM` does; for an unknown
            backend; for a forget_bias without biases.
    """

    backend: Backend | None = None
    forget_bias: float | None = None

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
        forget_bias: float | None = None,
    ) -> None:
        options = bias, batch_first, dropout, bidirectional, proj_size, device, dtype
        super().__init__("LSTM", input_size, hidden_size, num_layers, *options)
        if backend is not None:
            dispatch.check_name(backend)
            self.backend = backend
        if forget_bias is not None:
            self.forget_bias = checks.check_forget_bias(forget_bias, bias)
            self._set_forget_bias(self.forget_bias)

    def reset_parameters(self) -> None:
        """Draw the parameters again from uniform(-1/sqrt(H), 1/sqrt(H)), and the forget gate's from `forget_bias`."""
        super().reset_parameters()
        if self.forget_bias is not None:
            self._set_forget_bias(self.forget_bias)

    @torch.no_grad()
    def _set_forget_bias(self, value: float) -> None:
        H = self.hidden_size
        for _, _, bias_ih, bias_hh, *_ in self.all_weights:
            bias_ih[H : 2 * H].fill_(value)
            bias_hh[H : 2 * H].zero_()

    def extra_repr(self) -> str:
        text = super().extra_repr()
        for name in ("backend", "forget_bias"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        pass  # RNNBase keeps a second list of the weights, which goes stale; here the attributes are all there is

    def _layer_weights(self, index: int) -> list[Any]:
        """The weights of layer index // D, direction index % D, in the order of `lstm`'s arguments."""
        parameters: Any = self._parameters
        names = self._all_weights[index]
        try:
            weights = [parameters[name] for name in names]
        except KeyError:  # parametrized, or replaced by a plain tensor
            weights = [getattr(self, name) for name in names]
        if not self.bias:
            weights[2:2] = (None, None)
        return weights

    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    @overload
    def forward(
        self,
        input: X,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Lengths | None = None,
        return_cells: Literal[False] = False,
    ) -> tuple[X, State]: ...
    @overload
    def forward(
        self,
        input: X,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Lengths | None = None,
        return_cells: Literal[True],
    ) -> tuple[X, State, X]: ...
    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Lengths | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,  # noqa: A002
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Lengths | None = None,
        return_cells: bool = False,
    ) -> tuple[Any, ...]:
        """Run all layers over whole sequences.

        Args:
            input: (T, B, I); (B, T, I) with batch_first; (T, I) for one sequence alone; or a PackedSequence.
            hx: ``h_0`` (D*L, B, H_out) and ``c_0`` (D*L, B, H), without B for one sequence alone; None for zeros.
            reset: boolean (T, B), (B, T) with batch_first, (T,) for one sequence alone: the states are zero before the
                steps that are True, and gradients stop there. Equal to running the pieces apart. One direction only.
            lengths: integer (B,), or () for one sequence alone, in any order: a tensor on any device, a list, or an
                array. Row b ends after lengths[b] steps, at once where that is zero. Outputs past the end are zero,
                ``h_n`` and ``c_n`` are those at the end, and the reverse direction starts there. Equal to a
                PackedSequence, with nothing to sort, and no device to wait for. Each is from 0 to T. Where the values
                cannot be read, on another device than the CPU, while `torch.compile`, an export or a trace runs, and
                under torch.func's transforms, below 0 counts as 0 and beyond T as T. `lengths` win over `reset`.
            return_cells: also return the cell states of the last layer.

        Returns:
            output (T, B, D*H_out) of the last layer in the form of `input`, ``(h_n, c_n)`` of the sizes of `hx`, and
            with `return_cells` the cell states (T, B, D*H) in the form of `input` (those held there past a row's end).

        Raises:
            ValueError: for the number of dimensions or dtype of `input`, the shape of `reset` or `lengths`, a length
                below 0 or beyond T, `reset` where bidirectional, `reset` or `lengths` with a PackedSequence.
            RuntimeError: for other sizes, dtypes and devices, and from a backend asked for by name that cannot run.
            TypeError: for `input`, `hx`, `reset` or `lengths` of the wrong type.

        Equivalent to `torch.nn.LSTM.forward`.
        """
        if isinstance(input, PackedSequence):
            checks.check_no_masks(reset, lengths)
            return self._forward_packed(input, hx, return_cells)
        weights = self._layer_weights(0)
        plain = self.num_layers == 1 and not (self.bidirectional or self.proj_size or return_cells)
        if plain and reset is None and lengths is None and (slot := slot_of(self)) is not None:
            found = plain_sequence(slot, input, hx, tuple(weights), self.backend, self.batch_first)
            if found is not None:
                return found
        hx = checks.check_forward(self, input, hx, weights[0])
        lengths = None if lengths is None else tensor_of(lengths)
        mask = None if reset is None and lengths is None else self._step_mask(input, reset, lengths)
        holds = lengths is not None
        order = None if lengths is None else self._order(input, lengths)
        if input.dim() == 2:
            output, (h_n, c_n), *cells = self._run(input.unsqueeze(1), hx, mask, None, return_cells, weights, holds)
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1)), *(c.squeeze(1) for c in cells)
        run, x = self._run, input.transpose(0, 1) if self.batch_first else input
        if order is not None:
            run = partial(self._run_in_order, order)
        output, states, *cells = run(x, hx, mask, None, return_cells, weights, holds)
        if self.batch_first:
            output, *cells = (a.transpose(0, 1) for a in (output, *cells))
        return output, states, *cells

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        @_typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _order(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        if x.dim() == 2 or self.proj_size or not dispatch.sorts_lengths(self.backend, x.device, x.dtype):
            return None
        return longest_first(lengths, x.shape[1 if self.batch_first else 0], self.input_size, self.hidden_size)

    def _run_in_order(self, order: Tensor, x: Tensor, hx: State | None, mask: Tensor, *others: Any) -> tuple[Any, ...]:
        """`_run` with the batch rows in another order, in which dropout falls on them, and its results in theirs."""
        hx = None if hx is None else (take_rows(hx[0], order, 1), take_rows(hx[1], order, 1))
        mask, back = mask.index_select(1, order), order.argsort()
        output, (h_n, c_n), *cells = self._run(take_rows(x, order, 1), hx, mask, *others)
        output, *cells = (take_rows(a, back, 1) for a in (output, *cells))
        return output, (take_rows(h_n, back, 1), take_rows(c_n, back, 1)), *cells

    def _forward_packed(self, packed: PackedSequence, hx: State | None, return_cells: bool) -> tuple[Any, ...]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._layer_weights(0)
        checks.check_batch_sizes(batch_sizes, data.shape[0])
        hx = checks.check_forward(self, data, hx, weights[0], batch_sizes)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        takes_mask = not self.proj_size and dispatch.named(self.backend) != "aten"
        x, mask, places = unpack(data, batch_sizes, takes_mask)
        output, states, *cells = self._run(x, hx, mask, places, return_cells, weights, holds=False)
        output, *cells = (
            PackedSequence(pack(a, places), batch_sizes, sorted_indices, unsorted_indices) for a in (output, *cells)
        )
        return output, self.permute_hidden(states, unsorted_indices), *cells

    def _step_mask(self, x: Tensor, reset: Tensor | None, lengths: Tensor | None) -> Tensor | None:
        steps, batch = (x.shape[0], ()) if x.dim() == 2 else (x.shape[0], (x.shape[1],))
        if batch and self.batch_first:
            steps, batch = batch[0], (steps,)
        if reset is not None:
            size, layout = ((*batch, steps), "(B, T)") if self.batch_first else ((steps, *batch), "(T, B)")
            checks.check_reset(reset, size, layout if batch else "(T,)", self.bidirectional)
            reset = reset.unsqueeze(1) if not batch else reset.transpose(0, 1) if self.batch_first else reset
        if lengths is not None:
            checks.check_lengths(lengths, batch, steps if is_readable(lengths) else None)
            lengths = lengths if batch else lengths.unsqueeze(0)
        return step_mask(steps, x.device, reset, lengths)

    def _run(
        self,
        x: Tensor,  # (T,B,I)
        hx: State | None,
        mask: Tensor | None,
        places: Tensor | None,
        return_cells: bool,
        weights: list[Tensor],  # of layer 0, direction 0
        holds: bool = True,  # False: the mask only resets, or nobody sees the outputs of held steps
    ) -> tuple[Any, ...]:
        if self.num_layers == 1 and not self.bidirectional and not return_cells:  # the common case, kept short
            state = None if hx is None else (hx[0][0], hx[1][0])
            result = run_layer(x, state, *weights, mask=mask, holds=holds, backend=self.backend, slot=slot_of(self))
            return result[0], _stack([result[1]])
        T, B, directions = x.shape[0], x.shape[1], 2 if self.bidirectional else 1
        ends: list[State] = []
        for layer in range(self.num_layers):
            is_last, outputs, cells = layer == self.num_layers - 1, [], []
            indices = range(layer * directions, (layer + 1) * directions)
            each: list[Any] = [self._layer_weights(k) if k else weights for k in indices]
            begins = [None if hx is None else (hx[0][k], hx[1][k]) for k in indices]
            shows, slots = holds and is_last, [slot_of(self, k) for k in indices]
            together = None
            if directions == 2 and not (self.proj_size or return_cells):
                together = infer_both(slots, x, begins, each, self.backend, mask, shows)
            if together is not None:
                x, both_ends = together
                ends += both_ends
            else:
                for direction in range(directions):
                    result = run_layer(
                        x,
                        begins[direction],
                        *each[direction],
                        mask=mask,
                        holds=shows,
                        reverse=direction == 1,
                        return_cells=return_cells and is_last,
                        backend=self.backend,
                        slot=slots[direction],
                    )
                    outputs.append(result[0])
                    ends.append(result[1])
                    cells.append(result[-1])
                x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if self.dropout and self.training and not is_last:
                # over packed rows where torch.nn.LSTM drops over packed rows: the same seed gives the same zeros
                x = pad(F.dropout(pack(x, places), self.dropout), places, T, B)
        states = _stack(ends)
        if not return_cells:
            return x, states
        return x, states, torch.cat(cells, -1) if directions == 2 else cells[0]

    def step(self, x_t: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One time step through all layers, for streaming. One direction only.

        Args:
            x_t: (B, I), or (I,) for one sequence alone.
            state: h (L, B, H_out) and c (L, B, H), without B for one sequence alone; None for zeros.

        Returns:
            h_t (B, H_out) of the last layer, and the new state, in the form of `state`.

        Raises:
            ValueError: where bidirectional, and for the number of dimensions or dtype of `x_t`.
            TypeError: when `x_t` is no tensor, or `state` no tuple or list of tensors.
            RuntimeError: for other sizes, dtypes and devices, as `forward`.

        Equivalent to `forward` with T = 1.
        """
        weights = self._layer_weights(0)
        state = checks.check_step(self, x_t, state, weights[0])
        if x_t.dim() == 1:
            state = None if state is None else (state[0].unsqueeze(1), state[1].unsqueeze(1))
            h, (h_n, c_n) = self.step(x_t.unsqueeze(0), state)
            return h.squeeze(0), (h_n.squeeze(1), c_n.squeeze(1))
        if self.num_layers == 1 and not self.proj_size:  # the common case, kept short
            hx = None if state is None else (state[0].squeeze(0), state[1].squeeze(0))
            x = x_t.unsqueeze(0)
            output, (h, c) = run_layer(x, hx, *weights, backend=self.backend, slot=slot_of(self))
            return output.squeeze(0), (h.unsqueeze(0), c.unsqueeze(0))
        output, state = self._run(x_t.unsqueeze(0), state, None, None, False, weights)
        return output.squeeze(0), state

    @classmethod
    def from_torch(cls, module: nn.LSTM) -> "LSTM":
        """An LSTM with the arguments, mode, hooks and the very parameters of `module`, which stays as it is.

        Raises:
            TypeError: when `module` is no plain `torch.nn.LSTM`; `fastlstm.replace_lstm` takes subclasses and
                parametrized modules.
        """
        new = _with_class(module, nn.LSTM, cls)
        vars(new).pop("_flat_weights")  # see the property of that name
        return new

    def to_torch(self) -> nn.LSTM:
        """A `torch.nn.LSTM` with the arguments, mode, hooks and the very parameters of this one.

        Raises:
            TypeError: when this is a subclass's or a parametrized module; `fastlstm.restore_lstm` takes those.
        """
        new = _with_class(self, LSTM, nn.LSTM)
        for name in ("backend", "forget_bias", "_slots"):
            vars(new).pop(name, None)
        new._init_flat_weights()
        return new


def _stack(ends: list[State]) -> State:
    """The ends of each layer and direction as h_n (D*L, B, H_out) and c_n (D*L, B, H), which are no views: these can be
    detached in place, and changed in place where they were made without gradients.
    """
    return torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])


def _with_class(module: Any, expected: type, cls: Any) -> Any:
    """A shallow copy of `module` as an instance of `cls`: the same tensors, its own dictionaries."""
    if type(module) is not expected:
        raise TypeError(f"module must be a {expected.__module__}.{expected.__name__}, got {type(module).__name__}")
    new = cls.__new__(cls)
    new.__dict__.update({k: copy(v) if isinstance(v, dict | list | set) else v for k, v in vars(module).items()})
    return new
