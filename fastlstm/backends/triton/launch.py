"""The host side of the kernels: what a pass decides once for calls of one signature, and the forward pass itself.

Triton's own launch looks its kernel up by the type and alignment of every argument, which takes longer than the launch.
These are the same in all calls of a `Pass`: tensors are aligned, and kernels list numbers in `do_not_specialize`. So a
`Launch` looks its kernel up once.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
import triton
from torch import Tensor

from fastlstm.backends import base, reference, sums
from fastlstm.backends.base import Layer, Run
from fastlstm.backends.triton import cells, device, resident, stepwise, tiles
from fastlstm.backends.triton.products import pack_kernel

PACK_LINES = 16  # rows or columns that a program of pack_kernel takes


def on_device(target: torch.device) -> AbstractContextManager[object]:
    """Make a device the current one, on which Triton launches."""
    return torch.cuda.device(target) if target.type == "cuda" else nullcontext()


def readable(tensors: Iterable[Any]) -> tuple[Any, ...]:
    """Return the tensors contiguous and aligned; None stays. Another alignment would be another compilation."""
    return tuple([a if a is None or (a.is_contiguous() and a.data_ptr() % 16 == 0) else _copied(a) for a in tensors])


def addressable(a: Tensor, multiple: int = 1) -> Tensor:
    """Return `a` (T,B,N), or a copy if its strides are no multiples of `multiple` or pass a tile's 32-bit offsets."""
    step, row, unit = a.stride()
    direct = unit == 1 and row < 2**25 and step % multiple == row % multiple == 0 and a.data_ptr() % 16 == 0
    return a if direct else _copied(a)


def _copied(a: Tensor) -> Tensor:
    return a.clone(memory_format=torch.contiguous_format)


def project(x: Tensor, weight_ih: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Return the product of x with the bias, (T,B,X H), in the order of the weight's rows, or None without a weight."""
    if weight_ih is None:
        return None
    if weight_ih.dim() == 2:
        return torch.nn.functional.linear(x.contiguous(), weight_ih, bias)  # strided, it would be T products and a sum
    return sums.add_bias(sums.product(x, weight_ih), bias)


def describe_layer(layer: Layer, precision: str) -> tuple[Any, Any, int, int, int, int]:
    """Return the cell's functions, the tile, the layers of the stack, the batch rows of each, H, and the D units of a
    resident kernel's program: a head's, or all H if the cell has means over a row. x may be (B, I), for one step.
    """
    H, stack, means = base.hidden_size(layer), base.stack_size_of(layer) or 1, cells.means_of(layer.cell)
    D = H if "mean" in means else H // base.heads_of(layer)
    cell = cells.cell_functions(layer.cell, precision, D if means or layer.cell.products else 0)
    rows = (layer.x if layer.x.dim() == 2 else base.flat_input(layer.x)).shape[-2] // stack
    inputs = 0 if layer.weights[0] is None else int(layer.x.shape[-1])
    capability, masked = device.capability(layer.x.device), layer.lengths is not None or layer.reset is not None
    tile = tiles.choose(D, precision, capability, cell.gates, inputs)
    if isinstance(rows, int):  # a graph of open sizes takes the fewest
        multiprocessors = device.multiprocessors(layer.x.device)
        tile = tiles.with_rows(tile, precision, capability, masked, rows, stack * H // D, multiprocessors)
    return cell, tile, stack, rows, H, D


def lacks(layer: Layer, precision: str) -> str | None:
    """Return why there are no kernels for a layer, although there are some for its type and device, or None."""
    cell, tile, _, _, H, D = describe_layer(layer, precision)
    means = cells.means_of(layer.cell)
    if len(means) > 1 and base.heads_of(layer) > 1:
        return "the triton backend has no means over a row beside means over its heads, since a program has one of both"
    products = len(layer.cell.products)
    if products and not tiles.holds_products(tile, cell.h_preacts + products):
        return (
            "the triton backend takes products of values of a step up to 64 units, and at most 8 of them and the gates "
            f"that sum h, got {layer.cell.name} with {products} products, {cell.h_preacts} such gates and {D} units"
        )
    if isinstance(tile, tiles.Resident):
        return None
    if means:
        return f"the triton backend has no means over {D} units, since one program cannot hold their weights"
    if D < H and D % tile.units:
        return f"the triton backend needs large heads of a multiple of {tile.units} units, got {D}"
    return None


class Launch:
    """A kernel, the grid on which it runs, and its constants and options. The first start, and all in the interpreter,
    are Triton's own. Later ones call the compiled kernel, which still looks up the current stream and calls Triton's
    hooks. `compiles_only`: a start only compiles the kernel and loads it, for tensors on the device "meta".
    """

    def __init__(self, kernel: Any, launch_grid: tuple[int, ...], compiles_only: bool, **options: Any) -> None:
        self.kernel, self.launch_grid, self.options = kernel, launch_grid, options | {"enable_fp_fusion": True}
        self.compiles_only, self.compiled = compiles_only, cast(Any, None)

    def __call__(self, *arguments: Any) -> None:
        """Start the kernel. At every start the same arguments are None, and the others have the same types."""
        if self.compiled is not None:
            run, constants = self.compiled
            run(*arguments, *constants)
            return
        if self.compiles_only:
            if not hasattr(self.kernel, "warmup"):  # in the interpreter of Triton 3.5, which compiles nothing
                return
            compiled = self.kernel.warmup(*arguments, grid=self.launch_grid, **self.options)
        else:
            compiled = self.kernel[self.launch_grid](*arguments, **self.options)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            start = compiled[(*self.launch_grid, 1, 1)[:3]]  # which has loaded it
            if not self.compiles_only:
                self.compiled = start, tuple([self.options[a] for a in self.kernel.arg_names[len(arguments) :]])


class Pass:
    """What both passes decide once, from an example, for all layers of its shapes and types."""

    def __init__(self, layer: Layer, precision: str, backward: bool, tile: tiles.Tile | None) -> None:
        if tile is None and (reason := lacks(layer, precision)) is not None:  # torch's precision may have changed
            raise RuntimeError(reason)
        self.layout, self.precision, self.reverse = layer.cell.layout, precision, int(layer.reverse)
        cell, usual, stack, rows, H, D = describe_layer(layer, precision)
        self.cell, self.rows, self.H, self.D = cell, rows, H, D
        chosen: Any = usual if tile is None else tile
        self.tile, self.resident = chosen, isinstance(chosen, tiles.Resident)
        self.compiles_only = layer.x.is_meta
        self.T, self.B, _ = base.flat_input(layer.x).shape
        self.order = list(reference.step_order(self.T, layer.reverse))
        blocks = -(-rows // chosen.block_b) * stack
        self.launch_grid: tuple[int, ...] = (blocks, H // D if self.resident else -(-H // chosen.units))
        self.packs = self.resident and precision != "native"
        self.pack_hh, self.pack_product = (
            self._pack_of(blocks, stack, backward) if self.packs and count else None
            for blocks, count in ((cell.h_preacts, cell.h_preacts), (1, len(layer.cell.products)))
        )

    def _pack_of(self, blocks: int, stack: int, backward: bool) -> tuple[Any, tuple[int, int]]:
        """Return what starts `pack_kernel` for weights (blocks H, D), and the shape of their scale."""
        lines, terms = (self.H, blocks * self.D) if backward else (blocks * self.H, self.D)
        start = Launch(
            pack_kernel, (-(-lines // PACK_LINES) * stack,), self.compiles_only,
            BY_ROW=not backward, BLOCK=PACK_LINES, PAD=1 << (terms - 1).bit_length(),
        )  # fmt: skip
        return start, (stack, lines)

    def first(self, states: tuple[Any, ...], like: Tensor) -> tuple[Any, ...]:
        """Return the initial states (B,H) as the kernels read them. Resident ones take None for zeros."""
        if states[0] is not None or self.resident:
            return readable(states)
        return (like.new_zeros(self.B, self.H),) * len(states)

    def options(self, warps: int) -> dict[str, Any]:
        """Return the kernel's constants that follow from the tile, and Triton's options."""
        tile, exact = self.tile, tiles.INPUT_PRECISION[self.precision]
        if self.resident:
            return {
                "P": tile.P, "BLOCK_B": tile.block_b, "PRECISION": self.precision, "num_warps": warps, "num_stages": 1,
            }  # fmt: skip
        return {
            "UNITS": tile.units, "BLOCK_K": tile.block_k, "BLOCK_B": tile.block_b, "PRECISION": exact,
            "num_warps": warps, "num_stages": tile.stages,
        }  # fmt: skip

    def recurrent(self, weight_hh: Any) -> tuple[Any, Any, Any]:
        """Return weight_hh as the kernels take it, with its rows in the order of the pre-activations."""
        return self._packed(sums.in_order(weight_hh, self.layout.blocks_hh, -2), self.pack_hh)

    def of_products(self, weights: Sequence[Any]) -> tuple[Any, ...]:
        """Return the weights of products as resident kernels take them."""
        packed = [self._packed(a, self.pack_product) for a in weights]
        return tuple([part for parts in packed for part in (parts if self.packs else parts[:1])])

    def _packed(self, weight: Any, pack: Any) -> tuple[Any, Any, Any]:
        """Return a weight for the kernels: for resident ones float32 as two parts in fp16 and a scale."""
        if weight is not None and weight.shape[-1] < self.D:
            weight = sums.dense(weight, self.H)
        if pack is None:
            return weight, None, None
        start, scale_shape = pack
        high, low = (torch.empty_like(weight, dtype=torch.float16) for _ in range(2))
        scale = weight.new_empty(*scale_shape)
        start(weight, high, low, scale, *weight.shape[-2:], self.H)
        return high, low, scale


class Forward(Pass):
    """Runs layers like an example. With `save`, runs return what the backward pass reads. `axes`: leading axes of the
    last states. `tile`: if not `describe_layer`'s.
    """

    def __init__(
        self, layer: Layer, save: bool, precision: str, axes: tuple[int, ...] = (), tile: tiles.Tile | None = None
    ) -> None:
        super().__init__(layer, precision, False, tile)
        cell, H, I = self.cell, self.H, layer.x.shape[-1]
        self.save, self.last = save, (*axes, self.B, H)
        common = {
            "CELL": cell.forward, "BLOCKS": self.layout.blocks_ih, "S": cell.preacts, "Y": cell.h_preacts,
            "GATES": min(cell.gates, self.tile.forward_gates) if self.resident else cell.gates,
            "STATES": len(layer.states), "H": H, "D": self.D,
        }  # fmt: skip
        self.multiplies_x = False
        if self.resident:
            kernel, PI = resident.forward_kernel, self.tile.inputs
            self.multiplies_x = PI > 0
            common |= {"UNBOUNDED": cell.output_exceeds_one, "I": I if PI else 0, "PI": PI}
        else:
            kernel = stepwise.forward_kernel
        self.start = Launch(
            kernel, self.launch_grid, self.compiles_only, **common, **self.options(self.tile.forward_warps)
        )

    def run(self, layer: Layer) -> Run:
        with on_device(layer.x.device):
            return self._run(layer)

    def _run(self, layer: Layer) -> Run:
        T, B, H, save = self.T, self.B, self.H, self.save
        _, weights, states, lengths, reset, _, _, inputs, *_ = layer
        x: Any = base.flat_input(layer.x)  # then its product, unless the kernel multiplies it
        lengths, reset, weight_ih, weight_hh, bias_ih, bias_hh, *params = readable((lengths, reset, *weights))
        states = self.first(states, x)
        inputs = readable(inputs)
        bias, bias_hh = sums.biases(layer.cell, bias_ih, bias_hh)
        h = x.new_empty(T, B, H) if lengths is None else x.new_zeros(T, B, H)  # held steps write nothing there
        last = tuple([x.new_empty(*self.last) for _ in states])
        others = tuple([x.new_empty(T, B, H) if save else None for _ in states[1:]])
        saved = x.new_empty(T, B, len(self.layout.saved) * H) if save else None
        if self.multiplies_x:
            x = addressable(x)
        else:
            with device.products_in(self.precision):
                x = project(base.active_input(layer, base.held_steps(layer)), weight_ih, bias)
            weight_ih = bias = None
        count = len(layer.cell.params)
        operands, results = (bias_hh, tuple(params[:count]), inputs), ((h, *others), saved)
        weight_hh, *packed = self.recurrent(weight_hh)
        if self.resident:
            step, row, _ = (0, 0, 0) if x is None else x.stride()
            self.start(
                x, weight_ih, bias, weight_hh, *packed, self.of_products(params[count:]), *operands, states, lengths,
                reset, *results, last, T, B, self.rows, step, row, self.reverse,
            )  # fmt: skip
        else:
            float_states = tuple(
                a.to(torch.float32, copy=True) if k or self.cell.reads_h else None for k, a in enumerate(states)
            )
            h_n, spare = last[0], torch.empty_like(last[0])
            h_prev, h_next = states[0], h_n  # h of each row, where held steps have it apart
            for t_prev, t in pairwise([-1, *self.order]):
                self.start(
                    x, weight_hh, *operands, h_prev, lengths, reset, *results, h_next, float_states, t,
                    t_prev if lengths is None else -1, B, self.rows,
                )  # fmt: skip
                if lengths is not None:
                    h_prev, h_next, spare = h_next, spare, h_next
            h_n = h_n.copy_(h[self.order[-1]]) if lengths is None else h_prev
            last = (h_n, *(end.copy_(a) for end, a in zip(last[1:], float_states[1:]) if a is not None))
        return Run(h, last, (*others, saved) if save else ())
