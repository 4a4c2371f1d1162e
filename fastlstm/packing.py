"""Sequences of different lengths: packed data to a padded batch and back, and the step mask."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlstm import ops
from fastlstm.backends.reference import HOLD

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
    return isinstance(lengths, Tensor) and lengths.is_cpu and ops.is_untransformed(lengths)


def step_mask(T: int, device: torch.device, reset: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """The step mask, int32 (T, B), of `reset` (T, B) and `lengths` (B,): hold wins over reset. Waits for no device."""
    if lengths is None:
        return None if reset is None else reset.to(device, torch.int32, non_blocking=True)
    steps = torch.arange(T, device=device)
    past_end = steps.unsqueeze(1) >= lengths.to(device, torch.int64, non_blocking=True)  # (T,B)
    if reset is None:
        return past_end.to(torch.int32) * HOLD
    return reset.to(device, torch.int32, non_blocking=True).masked_fill(past_end, HOLD)


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


def unpack(data: Tensor, batch_sizes: Tensor, takes_mask: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A PackedSequence's data (N, I) as ``x`` (T, B, I), its step mask, and its rows' places for `pad` and `pack`.

    Mask and places are None where all sequences are equally long, and nothing is copied; but in a trace, which is to
    serve other sequences, they are there if the layer `takes_mask` as well as not. `batch_sizes` lies on the
    CPU, so no device is waited for.
    """
    if torch.compiler.is_compiling() or not torch.jit.is_tracing() or not takes_mask:
        T, B = batch_sizes.shape[0], int(batch_sizes[0])
        if int(batch_sizes[-1]) == B:
            return data.unflatten(0, (T, B)), None, None
        runs = torch.arange(B, device=batch_sizes.device) < batch_sizes.unsqueeze(1)  # (T,B)
    else:  # a trace would keep the number of rows that it read here
        rows: Any = batch_sizes[0]
        runs = torch.arange(rows, device=batch_sizes.device) < batch_sizes.unsqueeze(1)
        T, B = runs.shape
    mask = (~runs).to(torch.int32).mul_(HOLD).to(data.device, non_blocking=True)
    places = runs.flatten().nonzero().squeeze(1).to(data.device, non_blocking=True)  # (N,)
    return pad(data, places, T, B), mask, places


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
