"""The loop over layers and directions, for modules of any cell. The code below runs one layer, time first."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastlstm.autograd.elementary import take_rows
from fastlstm.backends import dispatch, settings
from fastlstm.backends.base import Layer, new_layer
from fastlstm.call import run, run_planned
from fastlstm.cells.spec import Cell
from fastlstm.layers import checks, input_checks
from fastlstm.layers.modules import CellModule
from fastlstm.layers.nested import forward_nested
from fastlstm.layers.packing import empty_input, inputs_of, longest_first, masks_of, pack, pad, unpack
from fastlstm.layers.recompute import Results, recomputed
from fastlstm.layers.weight_hooks import compute_weights

Tensors = tuple[Tensor, ...]
Masks = tuple[Tensor | None, Tensor | None]  # lengths and reset, as a `Layer` has them


class Recurrent(CellModule, nn.RNNBase):
    """A stack of recurrent layers, each in one or both directions."""

    permute_hidden: Any
    _regularizers: tuple[float, Any] | None = None  # see fastlstm.layers.regularized
    _recompute = False
    _trains = True  # whether the module can be trained, so that dropout may draw

    @property
    def recompute(self) -> bool:
        """Whether the backward pass computes the gates of long sequences again: see `fastlstm.layers.recompute`."""
        return self._recompute

    @recompute.setter
    def recompute(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"recompute should be a bool, got: {type(value).__name__}")
        if value:
            checks.check_option("recompute", value, self)
        self._recompute = value
        self.release_memory()  # a call that has a plan would go past it

    def flatten_parameters(self) -> None:
        """Do nothing: models of torch's modules call it. `release_memory` gives back what calls have left."""

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        pass  # RNNBase keeps a second list of the weights, which can go stale; here the attributes are the only source

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:  # noqa: A002
        """Raise ValueError or RuntimeError for an `input` of a wrong dtype or size, as `torch.nn.LSTM`."""
        try:
            super().check_input(input, batch_sizes)
        except ValueError as error:
            if input.is_floating_point():
                raise
            raise ValueError(str(error).partition(", or convert model")[0]) from None  # weights are no integers

    def _layer_weights(self, index: int) -> list[Any]:
        """Return the weights of layer index // D, direction index % D: as a `Layer` has them."""
        parameters: Any = self._parameters
        names = self._all_weights[index]
        try:
            weights = [*map(parameters.__getitem__, names)]
        except KeyError:  # parametrized, or replaced by a plain tensor
            weights = [getattr(self, name) for name in names]
        if not self.bias:
            weights[2:2] = (None, None)
        return weights

    def _weights_of_all(self) -> list[Any]:
        """Return `_layer_weights` of all layers and directions, one after the other."""
        weights = self._layer_weights(0)
        for k in range(1, len(self._all_weights)):
            weights += self._layer_weights(k)
        return weights

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def _forward(
        self, x: Any, hx: Any, reset: Any, lengths: Any, inner_states: bool = False, inputs: tuple[Tensor, ...] = ()
    ) -> tuple[Any, ...]:
        """Return what `forward` returns, for a user's own arguments: the output, the states, and, if wanted, the inner
        states of all steps. x is None where no gate sums it. `inputs`: tensors in the cell's order.
        """
        if isinstance(x, Tensor) and x.is_nested:
            return forward_nested(self, x, hx, reset, lengths, inner_states, inputs)
        weights = self._weights_of_all()  # read once, since a parametrization may draw random numbers
        if reset is None and lengths is None and not inner_states and not inputs:
            results = self._planned(x, hx, weights)
            if results is not None:
                return results
        example = self._example(weights)
        if x is None and not self._cell.gates_of_x:
            x = empty_input(inputs, self._cell.inputs, example, 3)
        if isinstance(x, PackedSequence):
            checks.check_no_masks(reset, lengths)
            return self._forward_packed(x, hx, inner_states, inputs, weights)
        states = input_checks.check_forward(self, x, hx, example)
        is_unbatched = x.dim() == 2
        x = x.unsqueeze(1) if is_unbatched else x.transpose(0, 1) if self.batch_first else x
        inputs = inputs_of(inputs, self._cell.inputs, x, self.hidden_size, is_unbatched, self.batch_first)
        masks = masks_of(lengths, reset, x, is_unbatched, self.batch_first, self.bidirectional)
        row_lengths, order = masks[0], None
        if not (is_unbatched or row_lengths is None) and dispatch.sorts_lengths(self.backend, x.device, x.dtype):
            order = longest_first(row_lengths, x.shape[0], self.input_size, self.hidden_size)
        if order is None:
            output, last, others = self._run(x, states, masks, None, inner_states, weights, inputs)
            if row_lengths is not None and output.requires_grad:
                # Callers may write to the padding of their copy.
                output, others = output.clone(), tuple([a.clone() for a in others])
        else:
            output, last, others = self._run_in_order(order, x, states, masks, inner_states, weights, inputs)
        if is_unbatched:
            output, last = output.squeeze(1), tuple([a.squeeze(1) for a in last])
            others = tuple([a.squeeze(1) for a in others])
        elif self.batch_first:
            output, others = output.transpose(0, 1), tuple([a.transpose(0, 1) for a in others])
        return output, last[0] if self._has_bare_state else last, *others

    def _planned(self, x: Any, hx: Any, weights: list[Any]) -> tuple[Tensor, Any] | None:
        """Return the results of a planned call that only runs the cell, or None. It needs no check again."""
        if torch.compiler.is_dynamo_compiling() or type(x) is not Tensor or len(x.shape) != 3:
            return None
        cell, plans = self._cell, self._plans
        states = self._states_of(cell, hx)
        if not plans or 0 not in plans or states is None or (self.dropout > 0 and self._drops):
            return None
        if self.batch_first:
            x = x.transpose(0, 1)
        layer = self._whole(cell, x, weights, states)
        plan = None if layer is None else plans[0].find(layer, self.backend, True)[1]
        if plan is None:
            return None
        output, last, _ = plan(layer)
        return output.transpose(0, 1) if self.batch_first else output, last[0] if self._has_bare_state else last

    @property
    def _drops(self) -> bool:
        """Whether this call drops outputs between layers."""
        return self.training and self.dropout > 0 and self.num_layers > 1 and self._trains

    def _whole(
        self, cell: Cell, x: Tensor, weights: list[Any], states: tuple[Any, ...], masks: Masks = (None, None)
    ) -> Any:
        """Return the record of a call of all layers and directions, or None where no plan serves."""
        directions = 2 if self.bidirectional else 1
        return new_layer(
            (x, tuple(weights), states, *masks, False, cell, (), (), 0, False, self.num_layers, directions)
        )

    def _run_in_order(
        self,
        order: Tensor,
        x: Tensor,
        hx: Any,
        masks: Masks,
        inner_states: bool,
        weights: list[Any],
        inputs: Tensors,
    ) -> Results:
        """Call `_run` on rows permuted to `order`, in which dropout also meets them. Permute the results back."""
        hx = None if hx is None else tuple([take_rows(a, order, 1) for a in hx])
        lengths, reset = (None if a is None else a.index_select(axis, order) for axis, a in enumerate(masks))
        x, *inputs_in_order = (take_rows(a, order, 1) for a in (x, *inputs))
        output, last, others = self._run(x, hx, (lengths, reset), None, inner_states, weights, tuple(inputs_in_order))
        back = order.argsort()
        output, *others_back = (take_rows(a, back, 1) for a in (output, *others))
        return output, tuple([take_rows(a, back, 1) for a in last]), tuple(others_back)

    def _forward_packed(
        self, packed: PackedSequence, hx: Any, inner_states: bool, inputs: Tensors, weights: list[Any]
    ) -> tuple[Any, ...]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        checks.check_batch_sizes(batch_sizes, data.shape[0])
        states = input_checks.check_forward(self, data, hx, self._example(weights), batch_sizes)
        states = None if states is None else self._permuted(states, sorted_indices)
        takes_lengths = dispatch.takes_lengths(self.backend)
        x, lengths, row_indices = unpack(data, batch_sizes, takes_lengths)
        inputs = inputs_of(inputs, self._cell.inputs, x, self.hidden_size, False, self.batch_first)
        inputs = self._permuted(inputs, sorted_indices)
        output, last, others = self._run(x, states, (lengths, None), row_indices, inner_states, weights, inputs)
        last = self._permuted(last, unsorted_indices)
        sequence, *rest = (
            PackedSequence(pack(a, row_indices), batch_sizes, sorted_indices, unsorted_indices)
            for a in (output, *others)
        )
        return sequence, last[0] if self._has_bare_state else last, *rest

    def _permuted(self, tensors: Any, order: Tensor | None) -> Tensors:
        return tuple(tensors) if order is None else tuple([a.index_select(1, order) for a in tensors])

    def _run(
        self,
        x: Tensor,  # (T,B,I)
        hx: Any,
        masks: Masks,
        row_indices: Tensor | None,
        inner_states: bool,
        weights: list[Any],  # of each layer and direction
        inputs: Tensors = (),
    ) -> Results:
        """Run all layers and directions, time first: in one call, or where that cannot be one by one."""
        T, B, directions = x.shape[0], x.shape[1], 2 if self.bidirectional else 1
        cell, plans = self._cell, None if inner_states or inputs else self._plans_of_all()
        if plans is not None:
            states = (None,) * len(cell.states) if hx is None else tuple(hx)
            run = run_planned(self._whole(cell, x, weights, states, masks), plans, settings.named(self.backend))
            if run is not None:
                return run.h, run.last, run.saved
        last_states: list[Tensors] = []
        count = len(weights) // len(self._all_weights)
        for number in range(self.num_layers):
            is_last, outputs = number == self.num_layers - 1, []
            others: list[Tensors] = []
            for direction in range(directions):
                k = number * directions + direction
                each = weights[k * count : (k + 1) * count]
                states = (None,) * len(cell.states) if hx is None else tuple([a[k : k + 1] for a in hx])
                layer = Layer(
                    x, tuple(each), states, *masks, direction == 1, cell, inputs, stacked=self._is_stacked,
                )  # fmt: skip
                output, last, rest = self._run_layer(k, layer, inner_states and is_last)
                outputs.append(output)
                last_states.append(last)
                others.append(rest)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if self._drops and not is_last:
                # Dropout draws for packed rows where torch.nn.LSTM does, so that the same seed gives the same zeros.
                x = pad(F.dropout(pack(x, row_indices), self.dropout), row_indices, T, B)
        last = last_states[0] if len(last_states) == 1 else tuple([torch.cat(each) for each in zip(*last_states)])
        return x, last, others[0] if directions == 1 else tuple([torch.cat(both, -1) for both in zip(*others)])

    def _plans_of_all(self) -> Any:
        """Return the plans for all parts in one call, or None where more than the cell runs, or one part."""
        runs_more = self._regularizers or self._recompute or self._is_stacked or self._drops
        return None if runs_more or len(self._all_weights) == 1 else self._plans_of(0)

    def _run_layer(self, k: int, layer: Layer, inner_states: bool) -> Results:
        """Run layer k // D, direction k % D."""
        is_whole = len(self._all_weights) == 1 and not (self._regularizers or self._recompute)
        return self._run_with(layer, self._plans_of(0 if is_whole else k + 1), inner_states)

    def _run_with(self, layer: Layer, plans: Any, inner_states: bool) -> Results:
        backend = settings.named(self.backend)  # the backward pass may run under another default

        def run_part(part: Layer) -> Results:
            result = run(part, plans=plans, backend=backend, has_layer_axis=True, inner_states=inner_states)
            return result.h, result.last, result.saved  # Dynamo of torch 2.9 cannot return a Run

        return recomputed(layer, run_part) if self._recompute else run_part(layer)

    def _step(self, x_t: Any, state: Any, inputs: tuple[Tensor, ...] = ()) -> tuple[Tensor, Any]:
        """Return what `step` returns, for arguments as a user gave them. `inputs`: (B, H), or (H,), in cell's order."""
        if self._forward_pre_hooks:
            compute_weights(self)
        weights = self._weights_of_all()
        if type(x_t) is Tensor and x_t.dim() == 2 and not (self.batch_first or inputs or x_t.is_nested):
            results = self._planned(x_t.unsqueeze(0), state, weights)
            if results is not None:
                return results[0].squeeze(0), results[1]
        if x_t is None and not self._cell.gates_of_x:
            x_t = empty_input(inputs, self._cell.inputs, self._example(weights), 2)
        states = input_checks.check_step(self, x_t, state, self._example(weights))
        layout = "(B, H)" if x_t.dim() == 2 else "(H,)"
        size = *x_t.shape[:-1], self.hidden_size
        inputs = input_checks.expanded(x_t, inputs, self._cell.inputs, size, layout)
        x, inputs = x_t.unsqueeze(0), tuple([a.unsqueeze(0) for a in inputs])
        if x_t.dim() == 1:
            x, inputs = x.unsqueeze(0), tuple([a.unsqueeze(0) for a in inputs])
            states = None if states is None else tuple([a.unsqueeze(1) for a in states])
        output, last, _ = self._run(x, states, (None, None), None, False, weights, inputs)
        if x_t.dim() == 1:
            output, last = output.squeeze(0), tuple([a.squeeze(1) for a in last])
        return output.squeeze(0), last[0] if self._has_bare_state else last
