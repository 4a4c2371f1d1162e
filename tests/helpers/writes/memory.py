"""Writes to a weight's memory that no operator of torch makes, and values that differ by little."""

import ctypes
import tempfile
from pathlib import Path

import torch
from torch import nn

from tests.helpers.writes.forms import BITS
from tests.helpers.writes.kinds import chosen, names_of, random_like


def storage_copied(m, n):
    p = getattr(m, n)
    p.untyped_storage().copy_(random_like(p).untyped_storage())


def storage_filled(m, n):
    getattr(m, n).untyped_storage().fill_(0x3C)


def storage_byte(m, n):
    storage, size = getattr(m, n).untyped_storage(), getattr(m, n).itemsize
    storage[2 * size - 1] = storage[2 * size - 1] ^ 0x81  # the sign and an exponent's bit


def moved(m, n):
    p = getattr(m, n)
    ctypes.memmove(p.data_ptr() + p.itemsize, random_like(p[:1]).data_ptr(), p.itemsize)


def through_memoryview(m, n):
    p = getattr(m, n)
    view = memoryview(p.detach().view(torch.uint8).numpy().reshape(-1))
    view[p.itemsize - 1] ^= 0x81


def numpy_element(m, n):
    w = getattr(m, n).detach()
    w.view(BITS[w.itemsize]).numpy()[-1] ^= 1 << (8 * w.itemsize - 2)  # a row's exponents


def numpy_rows(m, n):
    w = getattr(m, n).detach()
    array = w.view(BITS[w.itemsize]).numpy()
    array[:] = array[::-1].copy()


def numpy_sum(m, n):
    w = getattr(m, n).detach()
    if w.dtype == torch.bfloat16:  # of which numpy has none
        numpy_rows(m, n)
    else:
        array = w.numpy()
        array += 0.5


def shared_then_written(m, n):
    getattr(m, n).share_memory_().data.view(-1)[3].add_(1)


def mapped_file(module, k):
    """A file is written to, of which a weight is a mapping."""
    p, directory = chosen(module, k), tempfile.TemporaryDirectory()
    path = Path(directory.name, "weight")
    path.write_bytes(p.detach().view(torch.uint8).numpy().tobytes())
    p.data = torch.from_file(str(path), shared=True, size=p.numel(), dtype=p.dtype).view(p.shape)

    def write():
        with directory, path.open("r+b") as file:
            file.write(random_like(p).view(torch.uint8).numpy().tobytes())

    return write


def swap_tensors(module, k):
    name = names_of(module)[k % 4]
    setattr(module, name, nn.Parameter(getattr(module, name).detach()))  # the first has weak references to it
    return lambda: torch.utils.swap_tensors(getattr(module, name), nn.Parameter(random_like(getattr(module, name))))


def not_contiguous(module, k):
    name = names_of(module)[k % 2]
    setattr(module, name, nn.Parameter(getattr(module, name).detach().mT.contiguous().mT))
    return lambda: getattr(module, name).data[1, 2].add_(1)


def opposite_biases(m, n):
    """Their sum changes by roundings alone."""
    *_, p, q = m.parameters()
    p.data.add_(1000)
    q.data.sub_(1000)


def lowest_bit_of_a_bias(m, n):
    *_, p, _ = m.parameters()
    p.data.view(BITS[p.itemsize])[2] ^= 1


def sign_of_zero(module, k):
    w = chosen(module, k).data.view(-1)
    w[3] = -0.0
    return lambda: w[3].copy_(torch.tensor(0.0))


SIMPLE = (
    storage_copied, storage_filled, storage_byte, moved, through_memoryview, numpy_element, numpy_rows, numpy_sum,
    shared_then_written, opposite_biases, lowest_bit_of_a_bias,
)  # fmt: skip
PREPARED = (mapped_file, swap_tensors, not_contiguous, sign_of_zero)
