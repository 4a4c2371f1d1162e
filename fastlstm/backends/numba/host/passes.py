"""The part that the calls of both kernels share: packed weights, the cell operands, and how a kernel is started."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS
from fastlstm.backends.cpu import address, rows_contiguous, snapshot_of
from fastlstm.backends.numba.host import sizes, thread_split
from fastlstm.backends.numba.host.addresses import address_and_strides, stack_row_strides, stack_strides
from fastlstm.backends.numba.host.frames import Frame, Kernel, zeros
from fastlstm.backends.numba.host.packed_weights import PackedCache, digest_bytes
from fastlstm.backends.numba.host.signature import Signature, Weights, contiguous

NO_PRODUCTS = (None,)  # the weights of the products of a cell without any


def run_frames(frames: Sequence[Frame], side_by_side: bool) -> None:
    """Run prepared frames of one kernel: one after the other, or two `side_by_side`, each on threads of its own."""
    frame, other = frames[0], frames[-1]
    if side_by_side and frame.is_written and other.is_written and frame.task == other.task:
        both = frame.beside.get(other)
        if both is None:
            from fastlstm.backends.numba.host.tasks import bind_both

            both = frame.beside[other] = bind_both(frame, other)
        both[0]()
        return
    for frame in frames:
        if frame.is_written:
            frame.run()


class Pass:
    """Runs one kernel for calls of one signature. With a cache, the kernel compares the digests of all weights that it
    uses with those of the packed ones. If they differ, the weights are packed again, and the kernel runs once more.
    """

    kind: str  # "Forward" or "Backward"
    options: dict[str, Any]  # what a subclass was made with beside `signature` and `caches`

    def __init__(self, signature: Signature, caches: dict[Any, Any] | None, saves: bool = False) -> None:
        """`caches`: a `PackedCache` for each layout, or None to keep none. `saves`: for the backward pass."""
        s, size = signature, signature.dtype.itemsize
        self.signature, self.caches, self.stack_size = s, caches, s.stack_size or 1
        self.lanes = sizes.lanes_of(s.dtype)
        self.cache: PackedCache | None = None
        self.panels = sizes.panels_of(s.H, self.lanes)
        self.prototype = torch.empty(0, dtype=s.dtype, device="cpu")
        self.has_operands, first = s.counts.operands > 0, WEIGHTS + s.counts.params
        # the weights of products, in the order in which kernels have them
        self.products = [first + s.cell.products.index(name) for name in s.cell.layout.products]
        self.needs_cast = not (s.weight_dtype is s.rounded_dtype is s.dtype)
        self.state_shape, self.state_row_bytes = (*s.state_axes, s.rows, s.H), s.H * size
        self.h_0_row_bytes = s.h_width * size
        self.state_shapes = (*s.state_axes, s.rows, s.h_width), *[self.state_shape] * s.counts.inner_states
        self.zero_row = zeros(self.state_row_bytes)
        self.zeros_address = ctypes.addressof(self.zero_row)
        split = thread_split.split_threads(s.threads, s, self.panels, self.kind == "Backward", saves)
        self.threads, self.team_count = split

    def prepare(
        self, components: int, x_components: int, fields: dict[str, int], buffers: dict[str, int],
        packed: dict[str, int], caches_weights: bool, digested: tuple[int, ...], in_place: bool,
    ) -> None:  # fmt: skip
        """Prepare the kernel, and the cache of its packed weights.

        Args:
            components: how many bfloat16 numbers make up one where a product runs on the bf16 unit, 0 if none does. All
                products run there if `signature.components` is not 0, and otherwise some.
            x_components: the same for the products with weight_ih, whose packed layout depends on it.
            fields: the fields of the argument struct that all calls of the signature share, by name. More are added.
            buffers, packed: elements of each buffer, and of each part of the packed weights, by name.
            caches_weights: whether packed weights are kept from call to call, if there are `caches`.
            digested: elements of each weight that is compared.
            in_place: whether the original weights are read.
        """
        from fastlstm.backends.numba.host import arguments

        s, dtype = self.signature, self.signature.weight_dtype
        # without a cache if a weight is not whole words of 4 bytes, which digests read
        if caches_weights and self.caches is not None and not any(n * dtype.itemsize % 4 for n in digested):
            types = s.dtype, dtype, s.rounded_dtype, s.is_bfloat16
            key = self.kind, s.cell, s.I, s.H, s.h_width, s.biased, *types, s.components, x_components
            part_bytes = *(count * s.dtype.itemsize for count in packed.values()), digest_bytes(digested, dtype)
            self.cache = self.caches.setdefault(key, PackedCache(*part_bytes))
        else:
            buffers = buffers | packed
        fields = fields | s.input_strides | {"rows": s.rows, "reverse": s.reverse, "original_size": dtype.itemsize}
        fields["is_bfloat16"] = s.is_bfloat16
        buffer_sets = 1 if self.stack_size == 1 else self.threads
        crosses = s.heads > 1 and s.H // s.heads % self.lanes != 0
        rare = [f"in_place.{self.kind}"] * in_place + ["heads"] * crosses
        across = s.counts.has_phases or s.heads > 1  # units see each other by means, or not all of h: without the unit
        variant = "_across" if across else "_matrix" if s.components else "_mixed" if components else ""
        task = self.kind.lower() + variant
        self.kernel = Kernel(
            task, self.kind, s.cell, s.dtype, components, self.threads, self.team_count, fields, buffers, buffer_sets,
            rare,
        )  # fmt: skip
        self.write_call, self.call_offset = arguments.writer(self.kind, False, s.counts)
        self.write_cached_call, self.cached_call_offset = arguments.writer(self.kind, True, s.counts)

    def operand_fields(self, inputs: Weights, weights: Weights, *more: int) -> tuple[list[int], list[Tensor]]:
        """Return the fields of the cell's inputs and params, each followed by `more`, and tensors to keep for them."""
        inputs = (*map(rows_contiguous, inputs),)
        last = WEIGHTS + self.signature.counts.params
        params = [*map(contiguous, self.signature.cast((*(None,) * WEIGHTS, *weights[WEIGHTS:last]))[WEIGHTS:])]
        field_values = [n for a in inputs for n in (*address_and_strides(a), *more)]
        field_values += [n for a in params for n in (a.data_ptr(), 0, 0, *more)]
        return field_values, [*inputs, *params]

    def product_weights(self, weights: Weights) -> tuple[Tensor]:
        """Return the weights of all products as one, (products H, H / K), in the order of `Layout.products`."""
        own = [weights[k] for k in self.products]
        return (own[0].contiguous() if len(own) == 1 else torch.cat(own, -2),)

    def operand_stack_strides(self, operands: list[Tensor]) -> dict[str, int]:
        """Return the strides of inputs and params from one stacked layer to the next."""
        s, named = self.signature, [(f"operand{k}", a) for k, a in enumerate(operands)]
        inputs, params = dict(named[: s.counts.inputs]), dict(named[s.counts.inputs :])
        return stack_row_strides(s.B, **inputs) | stack_strides(**params)

    def start(self, weights: Weights, fields: Sequence[int], results: Any) -> Frame:
        """Return a frame with the arguments of a call on (weight_ih, weight_hh, bias_ih, bias_hh, product weights).
        `fields`: those after the weights. `results`: what the frame holds until `finish`.
        """
        cache, frame, packed = self.cache, self.kernel.borrow(), None
        if cache is None:
            if self.needs_cast:
                weights = self.signature.cast(weights)
            # the five zeros: no digests are computed, so no originals are read
            self.write_call(frame.arguments, self.call_offset, *map(address, weights), 0, 0, 0, 0, 0, *fields)
        elif (packed := cache.packed) is not None:
            ih, hh, b_ih, b_hh, products = weights  # the originals; the five zeros below: no weights are packed
            self.write_cached_call(
                frame.arguments, self.cached_call_offset, *packed.addresses, frame.mismatches, 0, 0, 0, 0, 0,
                0 if ih is None else ih.data_ptr(), 0 if hh is None else hh.data_ptr(),
                0 if b_ih is None else b_ih.data_ptr(), 0 if b_hh is None else b_hh.data_ptr(),
                0 if products is None else products.data_ptr(), *fields,
            )  # fmt: skip
        else:
            frame.is_written = False
        # the packed weights too: another thread may replace the cache's while the kernel runs
        frame.weights, frame.fields, frame.results, frame.packed = weights, fields, results, packed
        return frame

    def finish(self, frame: Frame) -> int:
        """Give back a frame that has run, after packing new weights and running it again if need be. Return whether the
        kernel met a number that the bf16 unit cannot take.
        """
        overflow, mismatches = frame.take_flags()
        if self.cache is not None and (mismatches or not frame.is_written):
            overflow = self._pack_and_run(self.cache, frame, frame.weights, frame.fields)
        self.kernel.take_back(frame)
        return overflow

    def run_frame(self, frame: Frame) -> None:
        """Run a prepared frame: in a stack, which has no cache of packed weights, once for each layer."""
        if self.stack_size == 1:
            if frame.is_written:
                frame.run()
            return
        from fastlstm.backends.numba.host.tasks import run_stack

        kernel = self.kernel
        run_stack(kernel.task, frame.arguments, self.stack_size, frame.strides, kernel.buffer_bytes, kernel.threads)

    def _pack_and_run(self, cache: PackedCache, frame: Frame, weights: Weights, call: Sequence[int]) -> int:
        """Run on newly packed weights. The cache gets them, unless the bf16 unit cannot take a number in them."""
        packed, originals = cache.allocate(), (*snapshot_of(weights),)  # whatever is written to the weights meanwhile
        copies = self.signature.cast(originals)
        weight_addresses = (*map(address, (*copies, *originals)),)
        self.write_cached_call(frame.arguments, self.cached_call_offset, *packed.addresses, 0, *weight_addresses, *call)
        frame.reset_barriers()
        frame.run()
        overflow, _ = frame.take_flags()
        if not overflow:
            cache.packed = packed
        return overflow

    @cached_property
    def without_bf16_unit(self) -> Any:
        """The same pass without the bf16 unit, for numbers that the unit cannot take."""
        pass_type: Any = type(self)
        signature = self.signature._replace(components=0, allows_bf16_unit=False)
        return pass_type(signature, caches=self.caches, **self.options)
