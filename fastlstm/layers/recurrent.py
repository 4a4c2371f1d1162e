"""What all modules have in common: the plans that they keep, and the loop over layers and directions.

The code below this file knows no layers, directions, dropout, packing or `batch_first`. It runs one layer, time first.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from fastlstm.autograd.elementary import take_rows
from fastlstm.backends import dispatch
from fastlstm.backends.base import Layer
from fastlstm.cells import library
from fastlstm.layers import checks
from fastlstm.layers.packing import lengths_of, longest_first, pack, pad, reset_of, unpack
from fastlstm.plan import Plans, run

State = tuple[Tensor, Tensor]
Masks = tuple[Tensor | None, Tensor | None]  # lengths and reset, as a `Layer` has them


class KeepsPlans:
    """A module that keeps `Plans` for each of its layers and directions. The first call makes them."""

    def _plans_of(self, index: int = 0) -> Plans | None:
        """Return the plans of layer index // D, direction index % D, or None under a compiler, which uses none."""
        if torch.compiler.is_compiling():
            return None
        plans: dict[int, Plans] = vars(self).setdefault("_plans", {})
        return plans.get(index) or plans.setdefault(index, Plans())

    def __getstate__(self) -> dict[str, Any]:
        of_torch = getattr(super(), "__getstate__", None)  # RNNBase has one; objects of Python 3.10 have none
        state = dict(vars(self) if of_torch is None else of_torch())
        state.pop("_plans", None)  # pickles must not refer to Plans
        return state

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop("_plans", None)  # packed copies would stay behind on the old device
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def flatten_parameters(self) -> None:
        """Drop the packed copies of the weights, which gives back their memory. Later calls pack the weights again.

        Nobody needs to call it, since a call that uses a packed copy notices changed weights. `torch.nn.LSTM` has a
        method of this name.
        """
        vars(self).pop("_plans", None)


class Recurrent(KeepsPlans, nn.RNNBase):
    """A stack of recurrent layers, each in one or both directions."""

    backend: dispatch.Backend | None = None
    permute_hidden: Any

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        pass  # RNNBase keeps a second list of the weights, which can go stale; here the attributes are the only source

    def _layer_weights(self, index: int) -> list[Any]:
        """Return the weights of layer index // D, direction index % D, in the order of `lstm`'s arguments."""
        parameters: Any = self._parameters
        names = self._all_weights[index]
        try:
            weights = [parameters[name] for name in names]
        except KeyError:  # parametrized, or replaced by a plain tensor
            weights = [getattr(self, name) for name in names]
        if not self.bias:
            weights[2:2] = (None, None)
        return weights

    def _forward(self, x: Any, hx: Any, reset: Any, lengths: Any, return_cells: bool) -> tuple[Any, ...]:
        """Return what `forward` returns, for arguments as a user gave them."""
        if isinstance(x, PackedSequence):
            checks.check_no_masks(reset, lengths)
            return self._forward_packed(x, hx, return_cells)
        if reset is None and lengths is None and not return_cells:
            found = self._planned(x, hx)
            if found is not None:
                return found
        weights = self._layer_weights(0)
        hx = checks.check_forward(self, x, hx, weights[0])
        single = x.dim() == 2
        x = x.unsqueeze(1) if single else x.transpose(0, 1) if self.batch_first else x
        T, batch = x.shape[0], () if single else (x.shape[1],)
        ends = lengths_of(lengths, batch, T, x.device)
        masks = ends, reset_of(reset, batch, T, x.device, self.batch_first, self.bidirectional)
        order = None if single or ends is None else self._order(x, ends)
        if order is None:
            output, states, *cells = self._run(x, hx, masks, None, return_cells, weights)
            if ends is not None and not self.bidirectional and output.requires_grad:
                # Callers may write to the padding of their copy. With two directions torch.cat has already copied it.
                output = output.clone()
        else:
            output, states, *cells = self._run_in_order(order, x, hx, masks, None, return_cells, weights)
        if single:
            return output.squeeze(1), (states[0].squeeze(1), states[1].squeeze(1)), *(c.squeeze(1) for c in cells)
        if self.batch_first:
            output, *cells = (a.transpose(0, 1) for a in (output, *cells))
        return output, states, *cells

    def _planned(self, x: Any, hx: Any) -> tuple[Tensor, State] | None:
        """Return the results of a module of one layer and direction if the call has a plan already, else None. This is
        valid without checks: an equal signature has been checked before.
        """
        if torch.compiler.is_dynamo_compiling() or self.num_layers > 1 or self.bidirectional or self.proj_size:
            return None
        plans = vars(self).get("_plans")  # none before the first call
        if not plans or type(x) is not Tensor or x.dim() != 3 or not checks.is_pair(hx):
            return None
        if self.batch_first:
            x = x.transpose(0, 1)
        layer = Layer(x, tuple(self._layer_weights(0)), hx or (None, None), None, None, False, library.lstm)
        _, plan = plans[0].find(layer, self.backend, True)
        if plan is None:
            return None
        run = plan(layer)
        return run.h.transpose(0, 1) if self.batch_first else run.h, run.last

    def _order(self, x: Tensor, lengths: Tensor) -> Tensor | None:
        if self.proj_size or not dispatch.sorts_lengths(self.backend, x.device, x.dtype):
            return None
        return longest_first(lengths, x.shape[0], self.input_size, self.hidden_size)

    def _run_in_order(self, order: Tensor, x: Tensor, hx: State | None, masks: Masks, *others: Any) -> tuple[Any, ...]:
        """Call `_run` on rows permuted to `order`, in which dropout also meets them. Permute the results back."""
        hx = None if hx is None else (take_rows(hx[0], order, 1), take_rows(hx[1], order, 1))
        lengths, reset = (None if a is None else a.index_select(axis, order) for axis, a in enumerate(masks))
        output, (h_n, c_n), *cells = self._run(take_rows(x, order, 1), hx, (lengths, reset), *others)
        back = order.argsort()
        output, *cells = (take_rows(a, back, 1) for a in (output, *cells))
        return output, (take_rows(h_n, back, 1), take_rows(c_n, back, 1)), *cells

    def _forward_packed(self, packed: PackedSequence, hx: State | None, return_cells: bool) -> tuple[Any, ...]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._layer_weights(0)
        checks.check_batch_sizes(batch_sizes, data.shape[0])
        hx = checks.check_forward(self, data, hx, weights[0], batch_sizes)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        takes_lengths = not self.proj_size and dispatch.named(self.backend) != "aten"
        x, lengths, places = unpack(data, batch_sizes, takes_lengths)
        output, states, *cells = self._run(x, hx, (lengths, None), places, return_cells, weights)
        output, *cells = (
            PackedSequence(pack(a, places), batch_sizes, sorted_indices, unsorted_indices) for a in (output, *cells)
        )
        return output, self.permute_hidden(states, unsorted_indices), *cells

    def _run(
        self,
        x: Tensor,  # (T,B,I)
        hx: State | None,
        masks: Masks,
        places: Tensor | None,
        return_cells: bool,
        weights: list[Tensor],  # of layer 0, direction 0
    ) -> tuple[Any, ...]:
        """Run all layers and directions, time first."""
        T, B, directions = x.shape[0], x.shape[1], 2 if self.bidirectional else 1
        ends: list[State] = []
        for number in range(self.num_layers):
            is_last, outputs = number == self.num_layers - 1, []
            cells: list[Any] = []
            for direction in range(directions):
                k = number * directions + direction
                each = weights if k == 0 else self._layer_weights(k)
                states = (None, None) if hx is None else (hx[0][k : k + 1], hx[1][k : k + 1])
                layer = Layer(x, tuple(each[:4]), states, *masks, direction == 1, library.lstm)
                result = run(
                    layer,
                    plans=self._plans_of(k),
                    backend=self.backend,
                    axis=True,
                    cells=return_cells and is_last,
                    weight_hr=each[4] if self.proj_size else None,
                )
                outputs.append(result.output)
                ends.append(result.last)
                cells.extend(result.others)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
            if self.dropout and self.training and not is_last:
                # Dropout draws for packed rows where torch.nn.LSTM does, so that the same seed gives the same zeros.
                x = pad(F.dropout(pack(x, places), self.dropout), places, T, B)
        states = ends[0] if len(ends) == 1 else (torch.cat([h for h, _ in ends]), torch.cat([c for _, c in ends]))
        if not return_cells:
            return x, states
        return x, states, torch.cat(cells, -1) if directions == 2 else cells[0]

    def _step(self, x_t: Any, state: Any) -> tuple[Tensor, State]:
        """Return what `step` returns, for arguments as a user gave them."""
        if type(x_t) is Tensor and x_t.dim() == 2 and not self.batch_first:
            found = self._planned(x_t.unsqueeze(0), state)
            if found is not None:
                return found[0].squeeze(0), found[1]
        weights = self._layer_weights(0)
        state = checks.check_step(self, x_t, state, weights[0])
        x = x_t.unsqueeze(0)
        if x_t.dim() == 2:
            output, state = self._run(x, state, (None, None), None, False, weights)
            return output.squeeze(0), state
        state = None if state is None else (state[0].unsqueeze(1), state[1].unsqueeze(1))
        h, (h_n, c_n) = self._run(x.unsqueeze(0), state, (None, None), None, False, weights)
        return h.flatten(), (h_n.squeeze(1), c_n.squeeze(1))


def with_class(module: Any, expected: type, cls: Any) -> Any:
    """Return a shallow copy of `module` as an instance of `cls`: the same tensors, its own dictionaries."""
    if type(module) is not expected:
        raise TypeError(f"module must be a {expected.__module__}.{expected.__name__}, got {type(module).__name__}")
    new = cls.__new__(cls)
    new.__dict__.update({k: copy(v) if isinstance(v, dict | list | set) else v for k, v in vars(module).items()})
    return new
