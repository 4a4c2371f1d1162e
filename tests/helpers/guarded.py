"""Runs layers of every kind on memory between unreadable pages: ``python -m tests.helpers.guarded FIRST END STEP``.

`guard.c`, loaded before all other libraries, gives each tensor and each buffer of the kernels pages of its own. What
the kernels read from outside ends or begins to the byte at an unreadable page, and cannot be written to. The results
have to be the bits of an unguarded run on one thread. The case that runs is printed first.
"""

import ctypes
import faulthandler
import random
import sys
from functools import partial

import torch

from fastlstm.backends import pool
from fastlstm.backends.numba.host import frames, passes
from tests.helpers import kinds
from tests.helpers.cases import Case
from tests.helpers.layers import UNAVAILABLE
from tests.helpers.threads import SPLITS, forget, split
from tests.helpers.tolerances import BF16, F32, F64

guard = ctypes.CDLL(None)
guard.guard_alloc.restype = ctypes.c_void_p
guard.guard_alloc.argtypes = ctypes.c_size_t, ctypes.c_size_t
guard.guard_free.argtypes = (ctypes.c_void_p,)
guard.guard_protect.argtypes = ctypes.c_void_p, ctypes.c_int
is_on, at_begin = (ctypes.c_int.in_dll(guard, f"guard_{name}") for name in ("on", "begin"))
SIZES = [1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 40, 47, 63, 64, 65, 100, 127, 129]
BACKENDS = [name for name in ("numba", "native", "numba-bf16") if UNAVAILABLE[name] is None]


class Piece:
    """Memory of the kernels' own, whose holders free it."""

    def __init__(self, size):
        self.address = guard.guard_alloc(64, size)

    def __del__(self):
        guard.guard_free(self.address)


def guard_buffers():
    """Give every buffer of `numba`'s kernels pages of its own."""

    def take(size):
        piece = Piece(size)
        return piece, piece.address

    def zeros(count):
        row = guard.guard_alloc(2, count)
        ctypes.memset(row, 0, count)
        return (ctypes.c_char * count).from_address(row)

    def allocate(cache):
        ends = (*cache.offsets[1:], cache.size)
        pieces = [Piece(end - begin) for begin, end in zip(cache.offsets, ends, strict=True)]
        return frames.PackedWeights(pieces, tuple(piece.address for piece in pieces))

    frames.SMALL, pool.SMALL = 1, sys.maxsize
    frames.take, passes.zeros, frames.PackedCache.allocate = take, zeros, allocate


def guarded(addresses, a):
    """A copy that ends or begins to the byte at an unreadable page, and cannot be written to."""
    if not a.numel():
        return a.clone()
    address = guard.guard_alloc(a.itemsize, a.nbytes)
    copy = torch.frombuffer((ctypes.c_char * a.nbytes).from_address(address), dtype=a.dtype).view(a.shape).copy_(a)
    guard.guard_protect(address, False)
    addresses.append(address)
    return copy


def drawn(number):
    """The names of a case, and a function that computes its results with a function `place`."""
    draw = random.Random(number)
    T, B = draw.choice([1, 1, 2, 3, 7, 12, 28, 33, 130]), draw.choice([1, 1, 2, 3, 5, 8, 13, 17, 24, 33, 65])
    sizes = T, max(1, min(B, 1000 // T)), draw.choice(SIZES), draw.choice(SIZES)
    what, name = draw.choice(["layer"] * 6 + ["int8", "stream", "ensemble"]), kinds.NAMES[number % len(kinds.NAMES)]
    if what == "int8" or (what != "layer" and name not in kinds.OF_X):
        name = draw.choice(kinds.OF_NATIVE)
    backend = draw.choice([each for each in BACKENDS if each != "native" or name in kinds.OF_NATIVE])
    if what != "layer":
        backend = "native" if what == "int8" and "native" in BACKENDS else "numba"
    dtype = draw.choice([F32, F32, BF16, F64]) if what == "layer" else F32
    flags = {"zeros": draw.random() < 0.5, "bias": draw.random() < 0.5, "mask": draw.choice(["", "lengths+reset"])}
    flags["heads"] = draw.choice([1, 3]) if what != "int8" else 1
    dtype = F32 if backend == "numba-bf16" and dtype is F64 else dtype
    case = Case(name, sizes, **flags, dtype=dtype, backend=backend, seed=draw.randrange(1 << 30))
    call = {
        "layer": partial(kinds.results, case),
        "int8": partial(kinds.results_of_int8, case, draw.choice(["int8", "int16"])),
        "stream": partial(kinds.results_of_stream, case),
        "ensemble": partial(kinds.results_of_ensemble, case, draw.choice([2, 3])),
    }[what]
    threads, begins = draw.choice(SPLITS), draw.random() < 0.5
    return (number, what, case, threads, begins), call, threads, begins


def run(number):
    names, call, threads, at_begin.value = drawn(number)
    print(*names, flush=True)
    with split(1, 1):
        want = call()
    addresses = []
    with split(*threads):
        is_on.value = 1
        got = [a.clone() for a in call(place=partial(guarded, addresses))]
        is_on.value = 0
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise SystemExit(f"result {k} differs by {(a - b).abs().max()}")
    forget()
    for address in addresses:
        guard.guard_free(address)


if __name__ == "__main__":
    faulthandler.enable()
    guard_buffers()
    for number in range(*map(int, sys.argv[1:])):
        run(number)
