"""The part that the calls of both kernels share: packed weights, the cell operands, and how a kernel is started."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS
from fastlstm.backends.memory import address, snapshot_of
from fastlstm.backends.numba.host import sizes, thread_split
from fastlstm.backends.numba.host.frames import Frame, Kernel, PackedCache, digest_bytes, zeros
from fastlstm.backends.numba.host.signature import ZERO, Signature, Source, Weights
from fastlstm.forks import cached_property

FIRST_WEIGHT = 2  # index of weight_ih among the operands of a call, see `Pass.bind`
WEIGHT_FIELDS = "weight_ih", "weight_hh", "bias", "bias_hh", "weight_products"
_address, _allocate = Tensor.data_ptr, methodcaller("__call__")
Allocations = dict[str, Callable[[], Tensor]]


class Binding(NamedTuple):
    """How calls with the same operands fill their fields. An operand that is missing in one is so in all of them.

    Attributes:
        present: returns the operands that are not None.
        allocations: make the tensors that a call writes.
        write: writes the fields of a call from its values: the addresses of the operands that are not None and of the
            results, whether the panels are taken from last to first, and where packed weights are kept, their
            addresses and that of the count of mismatches.
        write_packing: the same for a call that packs weights, from further addresses: of the weights to pack, and of
            those whose digests are stored.
        stack_strides: the stride of each address from one stacked layer to the next.
    """

    present: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    allocations: list[Callable[[], Tensor]]
    write: Any
    write_packing: Any
    stack_strides: dict[str, int]


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name}{k}" for k in range(count)]


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


class Pass(Kernel):
    """A kernel for calls of one signature. With a cache, it compares the digests of all weights that it uses with those
    of the packed ones. If they differ, the weights are packed again, and the kernel runs once more.
    """

    stacked_gates = True  # whether the gates of a stack have an axis of its layers
    options: dict[str, Any]  # what a subclass was made with beside `signature` and `caches`

    def __init__(self, signature: Signature, caches: dict[Any, Any] | None, saves: bool = False) -> None:
        """`caches`: a `PackedCache` for each layout, or None to keep none. `saves`: for the backward pass."""
        s, size = signature, signature.dtype.itemsize
        self.signature, self.caches, self.stack_size = s, caches, s.stack_size or 1
        self.lanes = sizes.lanes_of(s.dtype)
        self.cache: PackedCache | None = None
        self.panels = sizes.panels_of(s.H, self.lanes)
        self.prototype = torch.empty(0, dtype=s.dtype, device="cpu")
        self.flip, self.first_product = 0, WEIGHTS + s.counts.params
        # the weights of products, in the order in which kernels have them
        self.products = [self.first_product + s.cell.products.index(name) for name in s.cell.layout.products]
        # the tensors of a layer, in the order in which `begin` of both passes puts them after the prototype
        self.names = [
            "x", "weight_ih", "weight_hh", "bias", "bias_hh", *_numbered("param", s.counts.params),
            *_numbered("weight_product", s.counts.products), *_numbered("state", s.counts.inner_states + 1),
            *_numbered("input", s.counts.inputs), "lengths", "reset",
        ]  # fmt: skip
        self.needs_cast = not (s.weight_dtype is s.rounded_dtype is s.dtype)
        self.state_row_bytes = s.H * size
        self.h_0_row_bytes = s.h_width * size
        widths = s.h_width, *[s.H] * s.counts.inner_states
        self.state_shapes = tuple([(*s.state_axes, s.rows, width) for width in widths])
        self.zero_row = zeros(self.state_row_bytes)
        self.zeros_address = ctypes.addressof(self.zero_row)
        split = thread_split.split_threads(s.threads, s, self.panels, self.kind == "Backward", saves)
        self.threads, self.team_count = split

    def prepare(
        self, fields: dict[str, int], buffers: dict[str, int], packed: dict[str, int], caches_weights: bool,
        digested: tuple[int, ...], in_place: bool,
    ) -> None:  # fmt: skip
        """Prepare the kernel, and the cache of its packed weights.

        Args:
            fields: the fields of the argument struct that all calls of the signature share, by name. More are added.
            buffers, packed: elements of each buffer, and of each part of the packed weights, by name.
            caches_weights: whether packed weights are kept from call to call, if there are `caches`.
            digested: elements of each weight that is compared.
            in_place: whether the original weights are read.
        """

        s, dtype = self.signature, self.signature.weight_dtype
        # without a cache if a weight is not whole words of 4 bytes, which digests read
        if caches_weights and self.caches is not None and not any(n * dtype.itemsize % 4 for n in digested):
            types = s.dtype, dtype, s.rounded_dtype, s.is_bfloat16
            key = self.kind, s.cell, s.I, s.H, s.h_width, s.biased, *types, s.components
            part_bytes = *(count * s.dtype.itemsize for count in packed.values()), digest_bytes(digested, dtype)
            self.cache = self.caches.setdefault(key, PackedCache(*part_bytes))
        else:
            buffers = buffers | packed
        fields = fields | s.input_strides | {"rows": s.rows, "reverse": s.reverse, "original_size": dtype.itemsize}
        fields["is_bfloat16"] = s.is_bfloat16
        buffer_sets = 1 if self.stack_size == 1 else self.threads
        crosses = s.heads > 1 and s.H // s.heads % self.lanes != 0
        rare = [f"in_place.{self.kind}"] * in_place + ["heads"] * crosses
        across = s.counts.has_phases or s.heads > 1  # units see each other by means, or not all of h
        variant = "_matrix" if s.components else ""
        task = self.kind.lower() + variant + "_across" * across
        self.prepare_task(task, fields, buffers, buffer_sets, rare)
        casts = self.needs_cast and (self.cache is None or s.counts.params > 0)
        self.prepares_weights = casts or len(self.products) > 1

    def prepared(self, weights: Weights) -> Weights:
        """Return the weights as calls read them: all products as one, (products H, H / K), in the order of
        `Layout.products`, and what no cache keeps packed in the type that the kernel computes in.
        """
        if len(self.products) > 1:
            joined = torch.cat([weights[k] for k in self.products], -2)
            weights = *weights[: self.first_product], joined, *[None] * (len(self.products) - 1)
        last = self.first_product
        cast = self.signature.cast(weights, narrow=(0, 1, last))
        return cast if self.cache is None else (*weights[:WEIGHTS], *cast[WEIGHTS:last], *weights[last:])

    def bind(
        self, operands: Sequence[Any], more: Sequence[str], allocations: Allocations, sources: dict[str, Source],
        h_offset: int = 0, state_offset: int = 0,
    ) -> Binding:  # fmt: skip
        """Return how calls with these operands fill their fields. This is the one place that knows the fields which
        both passes have.

        Args:
            operands: of an example: `prototype`, whose address is 0, the tensors of `names`, and those that are named
                in `more`. They are readable.
            allocations: the names of results, and what makes each.
            sources: of the fields that only this pass has.
            h_offset, state_offset: bytes from the beginning of h_0, and of the other states, to those of this part.
        """
        from fastlstm.backends.numba.host import arguments

        s, counts, kind = self.signature, self.signature.counts, self.kind
        size = s.dtype.itemsize
        names = [ZERO, *self.names, *more]
        indices = [k for k, a in enumerate(operands) if a is not None]
        present = [names[k] for k in indices]
        weights = {"weight_ih": "weight_ih", "weight_hh": "weight_hh", "weight_products": "weight_product0"}
        if kind == "Forward":
            weights |= {"bias": "bias", "bias_hh": "bias_hh"}
        has_states = "state0" in present
        rows = {"h_0_row_stride": self.h_0_row_bytes}
        fields = {"x": ("x", 0), "h_0": ("state0", h_offset), "lengths": ("lengths", 0), "reset": ("reset", 0)}
        for k in range(counts.inner_states):
            fields[f"initial{k}"] = f"state{k + 1}", state_offset
            rows[f"initial_row_stride{k}"] = self.state_row_bytes
        if not has_states:  # one row of zeros stands for all
            fields |= {name: (ZERO, self.zeros_address) for name, (of, _) in fields.items() if "state" in of}
            rows = {}
        for k, (step, *_, row, _) in enumerate(s.strides[3:]):
            fields[f"operand{k}"] = f"input{k}", 0
            rows |= {f"operand_step_stride{k}": step * size, f"operand_row_stride{k}": row * size}
        fields |= {f"operand{counts.inputs + k}": (f"param{k}", 0) for k in range(counts.params)}
        sources = sources | fields | {name: (ZERO, stride) for name, stride in rows.items()}
        sources |= {name: (name, 0) for name in arguments.ADDED}
        values, write_packing = [*present, *allocations, "flip"], None
        read = {name: (of, 0) for name, of in weights.items()}
        if self.cache is not None:
            cached = {name: (name, 0) for name in arguments.cached_names(kind)}
            values += *cached, "mismatches"
            originals = [(name, f"original_{name.removeprefix('weight_')}") for name in WEIGHT_FIELDS]
            copied = *(f"copy of {name}" for name in WEIGHT_FIELDS), *(name for _, name in originals)
            packing = sources | cached | {name: (f"copy of {name}", 0) for name in weights}
            packing |= {original: (original, 0) for name, original in originals if name in weights}
            write_packing = arguments.writer(kind, True, counts, [*values, *copied], packing)
            read = cached | {original: (weights[name], 0) for name, original in originals if name in weights}
        write = arguments.writer(kind, self.cache is not None, counts, values, sources | read)
        strides: dict[str, int] = {}
        if self.stack_size > 1:
            tensors = dict(zip(present, (operands[k] for k in indices))) | {
                name: new() for name, new in allocations.items()
            }
            strides = self._stack_strides(tensors, sources | read)
        return Binding(itemgetter(*indices), [*allocations.values()], write, write_packing, strides)

    def _stack_strides(self, tensors: dict[str, Tensor], sources: dict[str, Source]) -> dict[str, int]:
        """Return the stride of each field's address from one stacked layer to the next."""
        s = self.signature
        strides = s.input_stack_strides
        for field, (name, _) in sources.items():
            if name != ZERO and name in tensors and field not in strides:
                a = tensors[name]
                has_axis = name.removeprefix("d_").startswith(("weight", "bias", "param"))
                has_axis = has_axis or (name == "gates" and self.stacked_gates)
                strides[field] = (a.stride(0) if has_axis else s.B * a.stride(-2)) * a.element_size()
        return strides

    def start(self, binding: Binding, operands: Sequence[Any], rerun: Any) -> Frame:
        """Return a frame with the arguments of a call.

        Args:
            operands: the tensors that the call reads, see `bind`.
            rerun: the arguments of `run`, for a call that meets a number which the bf16 unit cannot take.
        """
        cache, frame, packed = self.cache, self.borrow(), None
        self.flip ^= 1
        results = [*map(_allocate, binding.allocations)]
        numbers = *map(_address, binding.present(operands)), *map(_address, results), self.flip
        if cache is None:
            binding.write(frame.arguments, numbers)
        elif (packed := cache.packed) is not None:
            binding.write(frame.arguments, (*numbers, *packed.addresses, frame.mismatches))
        else:
            frame.is_written = False
        # the packed weights too: another thread may replace the cache's while the kernel runs
        frame.call = binding, operands, results, rerun, numbers, packed
        if binding.stack_strides:
            self._run_as_stack(frame, binding)
        return frame

    def _run_as_stack(self, frame: Frame, binding: Binding) -> None:
        """Make a frame run once for each layer of a stack, which has no cache of packed weights."""
        from fastlstm.backends.numba.host.tasks import run_stack

        strides = binding.stack_strides
        frame.run = partial(
            run_stack, self.task, frame.arguments, self.stack_size, strides, self.buffer_bytes, self.threads
        )

    def finish(self, frame: Frame) -> int:
        """Give back a frame that has run, after packing new weights and running it again if need be. Return whether the
        kernel met a number that the bf16 unit cannot take.
        """
        overflow, mismatches = frame.flags
        if overflow or mismatches:
            frame.flags[0] = frame.flags[1] = 0
        if self.cache is not None and (mismatches or not frame.is_written):
            overflow = self._pack_and_run(self.cache, frame)
        self.take_back(frame)
        return overflow

    def _pack_and_run(self, cache: PackedCache, frame: Frame) -> int:
        """Run on newly packed weights. The cache gets them, unless the bf16 unit cannot take a number in them."""
        binding, operands, _, _, numbers, _ = frame.call
        first = FIRST_WEIGHT + self.first_product
        weights = *operands[FIRST_WEIGHT : FIRST_WEIGHT + WEIGHTS], operands[first] if self.products else None
        packed, originals = cache.allocate(), (*snapshot_of(weights),)  # whatever is written to the weights meanwhile
        copies = self.signature.cast(originals)
        numbers = *numbers, *packed.addresses, 0, *map(address, copies), *map(address, originals)
        binding.write_packing(frame.arguments, numbers)
        frame.reset_barriers()
        frame.run()
        overflow, _ = frame.flags
        frame.flags[0] = 0
        if not overflow:
            cache.packed = packed
        return overflow

    @cached_property
    def without_bf16_unit(self) -> Any:
        """The same pass without the bf16 unit, for numbers that the unit cannot take."""
        pass_type: Any = type(self)
        return pass_type(self.signature._replace(components=0), caches=self.caches, **self.options)
