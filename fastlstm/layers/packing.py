"""Lengths, resets and PackedSequences: from the forms that users give to the forms that backends take."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlstm.autograd.modes import is_untransformed
from fastlstm.layers import checks, input_checks

Lengths = Tensor | Sequence[int] | np.ndarray[Any, np.dtype[np.integer[Any]]] | int  # (B,); () for one sequence alone
Resets = Tensor | Sequence[bool] | Sequence[Sequence[bool]] | np.ndarray[Any, np.dtype[np.bool_]]  # (T, B) or (B, T)


def tensor_of(values: Any, kind: Any = np.int64) -> Any:
    """Return lengths or resets as a tensor, of `kind` if empty, or as they are where `checks` is to raise."""
    if isinstance(values, Tensor):
        return values
    try:
        array = np.array(values)  # a copy: torch takes no negative strides, and warns of read-only arrays
        return torch.as_tensor(array if array.size else array.astype(kind), device="cpu")
    except (TypeError, ValueError):
        return values


def is_readable(lengths: Any) -> bool:
    """Return whether the values of the lengths can be read: not on a GPU, in a trace or under a transform."""
    return isinstance(lengths, Tensor) and lengths.is_cpu and is_untransformed(lengths)


def masks_of(
    lengths: Any,
    reset: Any,
    x: Tensor,
    is_unbatched: bool = False,
    batch_first: bool = False,
    bidirectional: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Return `lengths` as int64 (B,) and `reset` as bool (T, B), or None each, on the device of `x` (T, B, I), without
    a wait for it. `is_unbatched`: they have no batch dimension. `batch_first`: `reset` is (B, T). `bidirectional`: the
    layer is, and may have no `reset`. Raises what `checks.check_lengths` and `checks.check_reset` raise.
    """
    T, batch = x.shape[0], () if is_unbatched else (x.shape[1],)
    if lengths is not None:
        lengths = tensor_of(lengths)
        checks.check_lengths(lengths, batch, T if is_readable(lengths) else None)
        lengths = lengths.to(x.device, torch.int64, non_blocking=True)
        lengths = lengths.unsqueeze(0) if is_unbatched else lengths
    if reset is not None:
        size, layout = ((*batch, T), "(B, T)") if batch_first else ((T, *batch), "(T, B)")
        reset = tensor_of(reset, np.bool_)
        checks.check_reset(reset, size, "(T,)" if is_unbatched else layout, bidirectional)
        reset = reset.unsqueeze(1) if is_unbatched else reset.transpose(0, 1) if batch_first else reset
        reset = reset.to(x.device, non_blocking=True)
    return lengths, reset


def rows_of(rows: Any, B: int) -> Any:
    """Return `rows`, None for all, as a slice or a tensor that indexes an axis of B rows. Indices on a GPU are not
    checked.

    Raises:
        TypeError: for other types than ints, booleans, and sequences, arrays and tensors of these.
        ValueError: for an index outside the rows, and for booleans of another shape than (B,).
    """
    wanted = f"rows must be an int, a slice, ints from -{B} to {B - 1}, or booleans of shape (B,) = ({B},), got"
    index = slice(None) if rows is None else rows if isinstance(rows, slice) else tensor_of(rows)
    if isinstance(index, slice):
        return index
    if not isinstance(index, Tensor):
        raise TypeError(f"{wanted} {type(rows).__name__}")
    if index.is_floating_point() or index.is_complex():
        raise TypeError(f"{wanted} {index.dtype}")
    if index.dtype == torch.bool:
        if index.shape != (B,):
            raise ValueError(f"{wanted} booleans of shape {tuple(index.shape)}")
        return index
    outside = [n for n in index.flatten().tolist() if not -B <= n < B] if index.is_cpu else []
    if outside:
        raise ValueError(f"{wanted} {outside[0]}")
    return index.to(torch.int64)


def inputs_of(
    tensors: tuple[Tensor, ...], names: Sequence[str], x: Tensor, H: int, is_unbatched: bool, batch_first: bool
) -> tuple[Tensor, ...]:
    """Return a cell's inputs `tensors`, called `names`, as (T, B, H). Raises what `input_checks.expanded` raises."""
    if not tensors:
        return ()
    T, batch = x.shape[0], () if is_unbatched else (x.shape[1],)
    size, layout = ((*batch, T, H), "(B, T, H)") if batch_first else ((T, *batch, H), "(T, B, H)")
    tensors = input_checks.expanded(x, tensors, names, size, "(T, H)" if is_unbatched else layout)
    if is_unbatched:
        return tuple([a.unsqueeze(1) for a in tensors])
    return tuple([a.transpose(0, 1) for a in tensors]) if batch_first else tensors


def empty_input(inputs: Sequence[Tensor], names: Sequence[str], like: Tensor, dims: int) -> Tensor:
    """Return x without features, (T, B, 0), like `like`, for a cell that reads none. `inputs` (T, B, H), called
    `names`, broadcast: the first size other than 1 counts. `dims`: of a batch's input, 3 or 2; others raise ValueError.
    """
    for name, a in zip(names, inputs):
        if a.dim() not in (dims, dims - 1):
            wanted = f"{dims} dimensions, or {dims - 1} for one sequence alone"
            raise ValueError(f"inputs[{name!r}] must have {wanted}, got shape {tuple(a.shape)}")
    most = max([a.dim() for a in inputs])
    shapes = [a.shape[:-1] for a in inputs if a.dim() == most]
    return like.new_empty((*[next((n for n in sizes if n != 1), 1) for sizes in zip(*shapes)], 0))


MIN_SORT_WORK = 1 << 26  # multiply-adds of a layer, a quarter of a millisecond, below which its rows are not sorted
MIN_SORT_UNITS = 96  # units below which rows are not sorted, since computing them takes no longer than copying them


def longest_first(lengths: Tensor, T: int, I: int, H: int) -> Tensor | None:
    """Return the permutation that sorts the rows longest first, or None: for sorted rows, for lengths that cannot be
    read, and for what is not a large layer where at least a quarter of all steps lie past the ends of their rows.
    """
    if not is_readable(lengths):
        return None
    # sizes are concrete here: is_readable was false while tracing
    if H < MIN_SORT_UNITS or T * len(lengths) * 4 * H * (I + H) < MIN_SORT_WORK:
        return None
    steps = lengths.to(torch.int64)
    if 4 * int(steps.sum()) > 3 * T * len(steps):
        return None
    ordered, order = steps.sort(descending=True, stable=True)
    return None if torch.equal(ordered, steps) else order


def unpack(data: Tensor, batch_sizes: Tensor, takes_lengths: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a PackedSequence's data (N, I) as ``x`` (T, B, I), its lengths (B,), and the indices of its N (step, row)
    pairs in x flattened to (T B, I).

    If all sequences are equally long, nothing is copied, and lengths and indices are None, but in `torch.jit.trace`, if
    the layer `takes_lengths`: a trace has to serve other sequences too. `batch_sizes` lies on the CPU, so nobody waits.
    """
    if torch.compiler.is_compiling() or not torch.jit.is_tracing() or not takes_lengths:
        T, B = batch_sizes.shape[0], int(batch_sizes[0])
        if int(batch_sizes[-1]) == B:
            return data.unflatten(0, (T, B)), None, None
        runs = torch.arange(B, device=batch_sizes.device) < batch_sizes.unsqueeze(1)  # (T,B)
    else:  # int() would fix the number of rows in the trace
        rows: Any = batch_sizes[0]
        runs = torch.arange(rows, device=batch_sizes.device) < batch_sizes.unsqueeze(1)
        T, B = runs.shape
    lengths = runs.sum(0).to(data.device, non_blocking=True)
    row_indices = runs.flatten().nonzero().squeeze(1).to(data.device, non_blocking=True)  # (N,)
    return pad(data, row_indices, T, B), lengths, row_indices


def pad(data: Tensor, row_indices: Tensor | None, T: int, B: int) -> Tensor:
    """Return `data` (N, I) as (T, B, I), with zeros past each sequence's end: the inverse of `pack`."""
    if row_indices is None:
        return data.unflatten(0, (T, B))
    # Autocast brings arguments of index_copy to one type, which float16 and bfloat16 lack. It leaves index_copy_ alone.
    return data.new_zeros(T * B, data.shape[1]).index_copy_(0, row_indices, data).unflatten(0, (T, B))


def pack(x: Tensor, row_indices: Tensor | None) -> Tensor:
    """Return the rows (N, I) of ``x`` (T, B, I) in the order of a PackedSequence, by `unpack`'s `row_indices`."""
    rows = x.flatten(0, 1)
    return rows if row_indices is None else rows.index_select(0, row_indices)
