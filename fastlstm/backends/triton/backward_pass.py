"""The backward pass: its kernels, and the products over all steps at once that torch does after them."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastlstm.backends import base, reference, sums
from fastlstm.backends.base import WEIGHTS, Gradients, Layer, Run
from fastlstm.backends.triton import resident, stepwise
from fastlstm.backends.triton.device import products_in
from fastlstm.backends.triton.launch import Launch, Pass, addressable, on_device, readable
from fastlstm.backends.triton.tiles import Tile


class KernelGradients(NamedTuple):
    """The gradients of the pre-activations (T,B,S H), and, if wanted, the initial states (B,H), each row's params (B,H)
    in float32, the inputs (T,B,H) and the products (T,B,H).
    """

    preact: Tensor
    states: tuple[Any, ...]
    params: tuple[Any, ...]
    inputs: tuple[Any, ...]
    products: tuple[Any, ...] = ()


class Backward(Pass):
    """Computes the gradients of layers like an example. `needs`: which. `tile`: if not `launch.describe_layer`'s."""

    def __init__(self, layer: Layer, needs: Gradients, precision: str, tile: Tile | None = None) -> None:
        super().__init__(layer, precision, True, tile)
        cell = self.cell
        self.needs, self.read = needs, {code // 2 for code in cell.read}
        self.biases = [want and a is not None for want, a in zip(needs.weights[2:WEIGHTS], layer.weights[2:WEIGHTS])]
        self.wants_bias = any(self.biases)
        self.stack = base.stack_size_of(layer)
        self.sums = sums.Sums(layer.cell, (None,) * WEIGHTS, self.H)
        common = {
            "CELL": cell.backward, "READ": cell.read, "CARRIED": cell.carried, "S": cell.preacts, "Y": cell.h_preacts,
            "SAVED": len(self.layout.saved), "H": self.H, "D": self.D,
        }  # fmt: skip
        kernel = (resident if self.resident else stepwise).backward_kernel
        if self.resident:
            common |= {"GATES": min(cell.gates, self.tile.backward_gates), "DIVIDES": cell.backward_divides}
        last, (first, later, earlier) = self.T - 1, (self.T - 1, 0, 1) if layer.reverse else (0, 1, 0)
        self.x_view = self._view_of(self.layout.x_preacts, cell.preacts, 0, self.T, True)
        self.first_h_view = self._view_of(self.layout.h_preacts, cell.preacts, first, 1, True)
        self.later_h_view = self._view_of(self.layout.h_preacts, cell.preacts, later, last, True)
        self.h_prev_view = self._view_of(range(1), 1, earlier, last, False)
        self.start = Launch(
            kernel, self.launch_grid, self.compiles_only, **common, **self.options(self.tile.backward_warps)
        )

    def _view_of(
        self, blocks: range, number: int, first: int, steps: int, transposed: bool
    ) -> tuple[list[int], list[int], int]:
        """Return size, strides and offset of a view of some of the `number` blocks of H columns in `_rows` of (T,B,Z
        H): its `steps` steps from `first` on, and if `transposed` as (columns, rows), after G for a stack.
        """
        rows, width = self.rows, number * self.H
        size, stride = [steps * rows, len(blocks) * self.H], [width, 1]
        if transposed:
            size, stride = size[::-1], stride[::-1]
        if self.stack:
            size, stride = [self.stack, *size], [self.T * rows * width, *stride]
        return size, stride, first * rows * width + blocks.start * self.H

    def _rows(self, a: Tensor) -> Tensor:
        """Return `a` (T,B,N) contiguous as (T B, N), or for a stack as (G, T B / G, N)."""
        return (sums.rows_of(a, self.stack) if self.stack else a).contiguous()

    def run(self, grads: Run, layer: Layer, run: Run) -> Gradients:
        """Return the gradients of a layer from those of its results, of which the same are None in all calls."""
        with products_in(self.precision), on_device(layer.x.device):
            return self._finished(self.launch(grads, layer, run), layer, run)

    def launch(self, grads: Run, layer: Layer, run: Run) -> KernelGradients:
        T, B, H, needs = self.T, self.B, self.H, self.needs
        dh, (h, *others, saved) = grads.h, readable((run.h, *run.saved))
        dlast, dsequences = readable(grads.last), readable(grads.saved) if grads.saved else (None,) * len(others)
        dh_step, dh_row = 0, 0
        if dh is not None:
            dh = addressable(dh, H)
            dh_step, dh_row, _ = dh.stride()
        of_weights = layer.weights[1], *layer.weights[WEIGHTS:]
        lengths, reset, weight_hh, *params = readable((layer.lengths, layer.reset, *of_weights))
        inputs = readable(layer.inputs) if layer.inputs else ()
        first = self.first(layer.states, saved)
        initial = tuple([a if k in self.read else None for k, a in enumerate(first)])
        sequences = tuple([a if k in self.read else None for k, a in enumerate((h, *others))])
        dpreact = saved.new_empty(T, B, self.cell.preacts * H)
        first_product = WEIGHTS + len(layer.cell.params)
        wants_params, wants_products = needs.weights[WEIGHTS:first_product], needs.weights[first_product:]
        dparams = tuple([saved.new_zeros(B, H, dtype=torch.float32) if want else None for want in wants_params])
        dproducts = tuple([saved.new_empty(T, B, H) if want else None for want in wants_products])
        dinputs = tuple([torch.empty_like(a) if want else None for a, want in zip(inputs, needs.inputs)])
        count = len(layer.cell.params)
        operands, weight_hh, *packed = (tuple(params[:count]), inputs, initial), *self.recurrent(weight_hh)
        if self.resident:
            wants = (want and a is not None for a, want in zip(first, needs.states))
            dstates = tuple([torch.empty_like(a) if want else None for a, want in zip(first, wants)])
            results = sequences, saved, dpreact, dstates, dparams, dinputs + dproducts
            sizes = T, B, self.rows, dh_step // H, dh_row // H, self.reverse
            weights = weight_hh, *packed, self.of_products(params[count:])
            self.start(dh, dsequences, dlast, *weights, *operands, lengths, reset, *results, *sizes)
            return KernelGradients(dpreact, dstates, dparams, dinputs, dproducts)
        dcarried = tuple(
            torch.zeros_like(a, dtype=torch.float32) if d is None else d.to(torch.float32, copy=True)
            for a, d in zip(first, dlast)
        )
        order = [-1, *self.order, -1]
        for t_prev, t, t_next in reversed(list(zip([-1, *order], order, order[1:]))):
            self.start(
                dh, dsequences, weight_hh, *operands, lengths, reset, sequences, saved, dpreact, dcarried, dparams,
                dinputs, t, t_prev, t_next, B, self.rows, dh_step // H, dh_row // H,
            )  # fmt: skip
        dstates = tuple(a.to(saved.dtype) if want else None for a, want in zip(dcarried, needs.states))
        return KernelGradients(dpreact, dstates, dparams, dinputs)

    def _finished(self, results: KernelGradients, layer: Layer, run: Run) -> Gradients:
        """Return all gradients, from the kernels' results and the run."""
        needs, weights, layout = self.needs, layer.weights, self.layout
        dpreact_rows = self._rows(results.preact)
        dx = dweight_ih = dweight_hh = None
        if needs.x and weights[0] is None:
            dx = torch.zeros_like(base.flat_input(layer.x))  # a cell may multiply no x
        elif needs.x:
            weight_ih: Any = sums.in_order(weights[0], layout.blocks_ih, -2)
            dx = sums.product(self.sums.x_part(results.preact), weight_ih.mT)
        if needs.weights[0]:
            x_active = base.active_input(layer, base.held_steps(layer))
            dweight_ih = dpreact_rows.as_strided(*self.x_view) @ sums.rows_of(x_active, self.stack)
            dweight_ih = sums.in_order(dweight_ih, layout.rows_ih, -2)
        if needs.weights[1]:
            dweight_hh = self._of_weight_hh(dpreact_rows, results.preact, layer, run.h)
            dweight_hh = sums.in_order(dweight_hh, layout.rows_hh, -2)
        dbiases: tuple[Any, ...] = None, None
        if self.wants_bias:
            dbias = sums.vector_gradient(results.preact, weights[3] if weights[2] is None else weights[2])
            dbiases = self.sums.bias_gradients(dbias, *self.biases)
        dparams = [
            None if terms is None else sums.vector_gradient(terms.unsqueeze(0), param).to(param.dtype)
            for terms, param in zip(results.params, weights[WEIGHTS:])
        ]
        dproducts = self._of_products(results.products, layer, run.saved[-1]) if layer.cell.products else []
        return Gradients(dx, (dweight_ih, dweight_hh, *dbiases, *dparams, *dproducts), results.states, results.inputs)

    def _of_products(self, gradients: tuple[Any, ...], layer: Layer, saved: Tensor) -> list[Any]:
        """Return the gradients of the weights of products, from those of the products (T,B,H) and the saved values."""
        cell, held = layer.cell, base.held_steps(layer)
        values, of_products = dict(zip(self.layout.saved, saved.split(self.H, -1))), cell.derived().multiplied
        return [
            None if g is None else sums.weight_gradient(g, base.fill(values[of_products[name]], held), weight)
            for name, g, weight in zip(cell.products, gradients, layer.weights[WEIGHTS + len(cell.params) :])
        ]

    def _of_weight_hh(self, dpreact_rows: Tensor, dpreact: Tensor, layer: Layer, h: Any) -> Tensor:
        """Return the gradient of weight_hh, its rows in the order of the pre-activations."""
        weight_hh, h_0 = cast(Any, (layer.weights[1], layer.states[0]))
        is_masked = layer.reset is not None or (layer.lengths is not None and h_0 is not None)
        if is_masked or weight_hh.shape[-1] < self.H:
            held = base.held_steps(layer)
            h_0 = base.given_states(layer)[0].reshape(self.B, self.H)  # a plan of a module has (1, B, H)
            h = reference.previous(h, h_0, layer, held, base.reset_steps(layer, held))
            return sums.weight_gradient(self.sums.h_part(dpreact), base.fill(h, held), weight_hh)
        h, (size, stride, offset) = self._rows(h), self.h_prev_view
        h, later = h.as_strided(size, stride, h.storage_offset() + offset), dpreact_rows.as_strided(*self.later_h_view)
        if h_0 is None:  # held steps add nothing, since dpreact and h are zero there
            return later @ h
        h_0 = sums.rows_of(h_0.reshape(1, self.B, self.H), self.stack)
        gradient = dpreact_rows.as_strided(*self.first_h_view) @ h_0
        return gradient if self.T == 1 else (torch.baddbmm if self.stack else torch.addmm)(gradient, later, h)
