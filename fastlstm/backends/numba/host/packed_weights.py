"""The cache of packed weights: packed once, they serve many calls."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, NamedTuple

import torch

from fastlstm.backends.numba.constants import LINE
from fastlstm.backends.pool import PAGE, Pages


class PackedWeights(NamedTuple):
    """The memory of packed weights, and the addresses of its parts and digests. Once cached it is never written to."""

    memory: Any
    addresses: tuple[int, ...]


class PackedCache:
    """Caches the packed weights of a layer and format, or None. A caller keeps its own reference to `packed`."""

    def __init__(self, *sizes: int) -> None:
        """`sizes`: bytes of each part, the last of which is the digests."""
        *self.offsets, self.size = (0, *itertools.accumulate(-(-size // LINE) * LINE for size in sizes))
        self.packed: PackedWeights | None = None

    def allocate(self) -> PackedWeights:
        """Empty the cache, and return memory for new packed weights. The caller sets `packed` after packing."""
        self.packed = None  # frees its memory before more is taken
        memory: Any
        if self.size >= PAGE:  # huge pages: weights of 13 MB are then read in 0.9 of the time
            memory = Pages(self.size)
            begin = memory.address
        else:
            memory = torch.empty(self.size, dtype=torch.uint8, device="cpu")
            begin = memory.data_ptr()
        return PackedWeights(memory, (*(begin + offset for offset in self.offsets),))


@cache
def digest_bytes(counts: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the bytes of all digests of weights. `counts`: the elements of each weight."""
    from fastlstm.backends.numba.kernels.digests import DIGEST
    from fastlstm.backends.numba.llvm.digest import DIGEST_BYTES

    return sum(-(-count * dtype.itemsize // (4 * DIGEST)) for count in counts) * DIGEST_BYTES
