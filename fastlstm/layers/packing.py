"""Sequences of different lengths and their resets: as users give them, and as backends take them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlstm.autograd.modes import is_untransformed
from fastlstm.layers import checks

Lengths = Tensor | Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]] | int  # (B,); () for one sequence alone


def tensor_of(lengths: Any) -> Any:
    """Lengths as a tensor. What cannot be one stays as it is, and is left to be explained."""
    if isinstance(lengths, Tensor):
        return lengths
    try:
        array = np.array(lengths)  # a copy: torch takes no negative strides, and warns of what is read-only
        return torch.as_tensor(array if array.size else array.astype(np.int64), device="cpu")
    except (TypeError, ValueError):
        return lengths


def is_readable(lengths: Any) -> bool:
    """Whether the lengths are a tensor whose values can be looked at: no device's, no tracer's and no transform's."""
    return isinstance(lengths, Tensor) and lengths.is_cpu and is_untransformed(lengths)


def lengths_of(given: Any, batch: tuple[int, ...], T: int, device: torch.device) -> Tensor | None:
    """`given` lengths as int64 (B,) on a device, which is not waited for. `batch`: (B,), or () for one sequence alone.

    Raises:
        TypeError, ValueError: for what are no lengths, see `checks.check_lengths`.
    """
    if given is None:
        return None
    lengths = tensor_of(given)
    checks.check_lengths(lengths, batch, T if is_readable(lengths) else None)
    lengths = lengths.to(device, torch.int64, non_blocking=True)
    return lengths if batch else lengths.unsqueeze(0)


def reset_of(
    given: Any, batch: tuple[int, ...], T: int, device: torch.device, batch_first: bool, bidirectional: bool = False
) -> Tensor | None:
    """A `given` reset as bool (T, B) on a device, which is not waited for.

    Raises:
        TypeError, ValueError: for what is no reset, see `checks.check_reset`.
    """
    if given is None:
        return None
    size, layout = ((*batch, T), "(B, T)") if batch_first else ((T, *batch), "(T, B)")
    checks.check_reset(given, size, layout if batch else "(T,)", bidirectional)
    reset: Tensor = given.unsqueeze(1) if not batch else given.transpose(0, 1) if batch_first else given
    return reset.to(device, non_blocking=True)


WORTH = 1 << 26  # multiply-adds of a layer from which its rows are put in order, of a quarter of a millisecond; and
WIDE = 96  # units, since fewer are computed as fast as they are copied


def longest_first(lengths: Tensor, T: int, I: int, H: int) -> Tensor | None:
    """An order of the rows, longest first, where that leaves out a quarter of a layer's products or more, and these are
    many; None where they lie so already, and where the lengths cannot be read. Each is from 0 to T.
    """
    if not is_readable(lengths):
        return None
    if H < WIDE or T * len(lengths) * 4 * H * (I + H) < WORTH:  # after a tracer has left, whose sizes are open
        return None
    steps = lengths.to(torch.int64)
    if 4 * int(steps.sum()) > 3 * T * len(steps):
        return None
    ordered, order = steps.sort(descending=True, stable=True)
    return None if torch.equal(ordered, steps) else order


def unpack(data: Tensor, batch_sizes: Tensor, takes_lengths: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A PackedSequence's data (N, I) as ``x`` (T, B, I), its lengths (B,), and its rows' places for `pad` and `pack`.

    Lengths and places are None where all sequences are equally long, and nothing is copied. But a trace is to serve
    other sequences too, so there they are given if the layer `takes_lengths`. `batch_sizes` lies on the CPU, so no
    device is waited for.
    """
    if torch.compiler.is_compiling() or not torch.jit.is_tracing() or not takes_lengths:
        T, B = batch_sizes.shape[0], int(batch_sizes[0])
        if int(batch_sizes[-1]) == B:
            return data.unflatten(0, (T, B)), None, None
        runs = torch.arange(B, device=batch_sizes.device) < batch_sizes.unsqueeze(1)  # (T,B)
    else:  # a trace would keep the number of rows that it read here
        rows: Any = batch_sizes[0]
        runs = torch.arange(rows, device=batch_sizes.device) < batch_sizes.unsqueeze(1)
        T, B = runs.shape
    lengths = runs.sum(0).to(data.device, non_blocking=True)
    places = runs.flatten().nonzero().squeeze(1).to(data.device, non_blocking=True)  # (N,)
    return pad(data, places, T, B), lengths, places


def pad(data: Tensor, places: Tensor | None, T: int, B: int) -> Tensor:
    """Rows (N, I) to (T, B, I), zero past each sequence's end. The inverse of `pack`."""
    if places is None:
        return data.unflatten(0, (T, B))
    # in place: autocast, which has only index_copy on its list, has no type that float16 and bfloat16 share
    return data.new_zeros(T * B, data.shape[1]).index_copy_(0, places, data).unflatten(0, (T, B))


def pack(x: Tensor, places: Tensor | None) -> Tensor:
    """The rows (N, I) of ``x`` (T, B, I) that lie within their sequences, in a PackedSequence's order."""
    rows = x.flatten(0, 1)
    return rows if places is None else rows.index_select(0, places)
