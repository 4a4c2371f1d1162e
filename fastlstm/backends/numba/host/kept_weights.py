"""Weights that are packed once for many calls."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import torch

from fastlstm.backends.cpu import address
from fastlstm.backends.memory import PAGE, Pages
from fastlstm.backends.numba.constants import LINE


class Packed(NamedTuple):
    """Packed weights, which nobody writes to once they are kept, and the addresses of their parts and digests."""

    memory: Any
    addresses: tuple[int, ...]


class Keeper:
    """Where a layer's plans keep packed weights of one kind: `packed`, or None before they are first used.

    Any thread may replace what is there. Who uses it holds on to it, so that it outlives its replacement.
    """

    def __init__(self, *sizes: int) -> None:
        """`sizes`: bytes of each part, of which the digests are the last."""
        *self.places, self.size = (0, *itertools.accumulate(-(-size // LINE) * LINE for size in sizes))
        self.packed: Packed | None = None

    def new(self) -> Packed:
        """Memory for weights that are about to be packed."""
        self.packed = None  # its memory before the new one's
        memory: Any
        if self.size >= PAGE:  # huge pages: weights of 13 MB are then read in 0.9 of the time
            memory = Pages(self.size)
            at = memory.address
        else:
            memory = torch.empty(self.size, dtype=torch.uint8, device="cpu")
            at = memory.data_ptr()
        return Packed(memory, (*(at + place for place in self.places),))


@cache
def digest_bytes(counts: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of the digests of weights of so many elements of a type."""
    from fastlstm.backends.numba.kernels.weights import digested_blocks
    from fastlstm.backends.numba.llvm.digest import DIGEST_BYTES

    return sum(digested_blocks(count * dtype.itemsize // 4) for count in counts) * DIGEST_BYTES


def addresses(weights: Any) -> tuple[int, ...]:
    """The addresses of weights, 0 for None."""
    return (*map(address, weights),)
