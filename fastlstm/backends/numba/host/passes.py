"""What both kernels' calls have in common: weights that a call packs for itself, or that stay packed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import WEIGHTS, Layer
from fastlstm.backends.cpu import rows_contiguous, snapshot_of
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.frames import Frame, Kernel, zeros
from fastlstm.backends.numba.host.kept_weights import Keeper, addresses, digest_bytes
from fastlstm.backends.numba.host.signature import Signature, Weights, contiguous


class Pass:
    """Runs one kernel for calls of one signature.

    With `kept` it reads weights that stay packed there from call to call. The kernel then compares the digest of all
    weights that it uses with that of the packed ones; where they differ, these are packed again and it runs once more.
    """

    kind: str
    options: tuple[Any, ...]  # the other arguments of the class

    def __init__(self, signature: Signature, kept: dict[Any, Any] | None) -> None:
        s, size = signature, signature.dtype.itemsize
        self.signature, self.kept, self.groups = s, kept, s.groups or 1
        self.lanes = sizes.lanes_of(s.dtype)
        self.keeper: Keeper | None = None
        self.panels = sizes.panels_of(s.H, self.lanes)
        self.like = torch.empty(0, dtype=s.dtype, device="cpu")
        self.has_values, self.casts = s.counts.values > 0, not (s.given is s.rounded is s.dtype)
        self.states, self.row = (*s.ends, s.rows, s.H), s.H * size
        self.no_state = zeros(self.row)
        self.zeros = ctypes.addressof(self.no_state)

    def split(self, back: bool) -> tuple[int, int]:
        """Return how many threads work, and how many teams they form, see `sizes.split`."""
        s = self.signature
        if self.groups > 1:  # each runs on one thread, and needs no barrier
            return 1 if s.rows * s.H * s.products < sizes.SERIAL else min(s.threads, self.groups), 1
        return sizes.split(s.threads, s, self.panels, back)

    def prepare(
        self, pieces: int, of_x: int, threads: int, team_count: int, fields: dict[str, int],
        buffers: dict[str, int], packed: dict[str, int], keeps: bool, digested: tuple[int, ...], in_place: bool,
    ) -> None:  # fmt: skip
        """`pieces`: of a number on the matrix unit, in some products or, with the signature's, in all; `packed`:
        elements of each part of the packed weights; `digested`: of those weights that are compared; `in_place`: whether
        they are read as they lie.
        """
        from fastlstm.backends.numba.host import arguments

        s = self.signature
        # a digest is of whole words
        if keeps and self.kept is not None and not any(count * s.given.itemsize % 4 for count in digested):
            key = self.kind, s.cell, s.I, s.H, s.biased, s.dtype, s.given, s.rounded, s.narrow, s.pieces, of_x
            parts_of = *(count * s.dtype.itemsize for count in packed.values()), digest_bytes(digested, s.given)
            self.keeper = self.kept.setdefault(key, Keeper(*parts_of))
        else:
            buffers = buffers | packed
        fields = fields | s.row_strides | {"rows": s.rows, "reverse": s.reverse, "original_size": s.given.itemsize}
        fields["is_narrow"] = s.narrow
        lanes = 1 if self.groups == 1 else threads
        crosses = s.heads > 1 and s.H // s.heads % self.lanes != 0
        rare = [f"in_place.{self.kind}"] * in_place + ["heads"] * crosses
        variant = "_across" if s.across else "_matrix" if s.pieces else "_mixed" if pieces else ""
        task = self.kind.lower() + variant
        self.kernel = Kernel(
            task, self.kind, s.cell, s.dtype, pieces, threads, team_count, fields, buffers, lanes, rare
        )
        tail = s.counts.others, s.counts.values, s.counts.params
        self.write, self.at = arguments.writer(self.kind, False, *tail)
        self.write_kept, self.at_kept = arguments.writer(self.kind, True, *tail)

    def values(self, layer: Layer, *more: int) -> tuple[list[int], list[Tensor]]:
        """What a kernel is told of the cell's inputs and params, with `more` numbers of each, and these as it reads
        them, to be held until it has run.
        """
        inputs = [*map(rows_contiguous, layer.inputs)]
        params = [*map(contiguous, self.signature.cast((*(None,) * WEIGHTS, *layer.weights[WEIGHTS:]))[WEIGHTS:])]
        told = [n for a in inputs for n in (*sizes.step_row(a), *more)]
        told += [n for a in params for n in (a.data_ptr(), 0, 0, *more)]
        return told, [*inputs, *params]

    def values_by_group(self, values: list[Tensor]) -> dict[str, int]:
        """Bytes from one group's inputs and params to the next one's."""
        s, named = self.signature, [(f"value{k}", a) for k, a in enumerate(values)]
        inputs, params = dict(named[: s.counts.inputs]), dict(named[s.counts.inputs :])
        return sizes.row_steps(s.B, **inputs) | sizes.first_steps(**params)

    def enter(self, weights: Weights, call: Sequence[int], by_group: dict[str, int] | None = None) -> int:
        """Run the kernel on weight_ih, weight_hh and the biases, in a stack for each group; whether it met a number
        that the matrix unit cannot take.
        """
        kernel, keeper = self.kernel, self.keeper
        frame = kernel.borrow()
        if keeper is None:
            if self.casts:
                weights = self.signature.cast(weights)
            self.write(frame.arguments, self.at, *addresses(weights), 0, 0, 0, 0, *call)
            if by_group is None:
                frame.run()
            else:
                kernel.run_stack(frame, self.groups, by_group)
            large, _ = frame.look()
        else:
            packed, stale = keeper.packed, 1
            if packed is not None:
                ih, hh, b_ih, b_hh = weights
                self.write_kept(
                    frame.arguments, self.at_kept, *packed.addresses, frame.stale, 0, 0, 0, 0,
                    0 if ih is None else ih.data_ptr(), 0 if hh is None else hh.data_ptr(),
                    0 if b_ih is None else b_ih.data_ptr(), 0 if b_hh is None else b_hh.data_ptr(), *call,
                )  # fmt: skip
                frame.run()
                large, stale = frame.look()
            if stale:
                large = self._pack_and_run(keeper, frame, weights, call)
        kernel.take_back(frame)
        return large

    def _pack_and_run(self, keeper: Keeper, frame: Frame, weights: Weights, call: Sequence[int]) -> int:
        """Run on newly packed weights. They are kept, unless the matrix unit cannot take a number in them."""
        packed, originals = keeper.new(), (*snapshot_of(weights),)  # whatever is written to the weights meanwhile
        copies = self.signature.cast(originals)
        addressed = *addresses(copies), *addresses(originals)
        self.write_kept(frame.arguments, self.at_kept, *packed.addresses, 0, *addressed, *call)
        frame.count_anew()
        frame.run()
        large, _ = frame.look()
        if not large:
            keeper.packed = packed
        return large

    @cached_property
    def without_unit(self) -> Any:
        """The same without the matrix unit, for numbers that it cannot take."""
        made: Any = type(self)
        return made(self.signature._replace(pieces=0, unit=False), *self.options, self.kept)
