"""Nested tensors as inputs: rows of different lengths, side by side without padding."""

from typing import Any

import torch
from torch.nested import nested_tensor_from_jagged

from fastlstm.layers import checks
from fastlstm.layers.packing import pack, pad


def forward_nested(module: Any, nested: Any, hx: Any, reset: Any, lengths: Any, *rest: Any) -> tuple[Any, ...]:
    """Return what a module returns for a nested input (B, j, I): outputs (B, j, D*H) with the input's offsets. Raise
    ValueError for another layout than `torch.jagged`, for other axes, and for `reset` or `lengths`.
    """
    checks.check_no_masks(reset, lengths, "nested tensor")
    if nested.layout is not torch.jagged:
        raise ValueError(
            f"a nested input must have the layout torch.jagged, got {nested.layout}: "
            "torch.nested.nested_tensor(tensors, layout=torch.jagged) makes one"
        )
    if nested.dim() != 3 or not isinstance(nested.shape[2], int):
        raise ValueError(f"a nested input must be (B, j, I), where rows have j steps each, got {tuple(nested.shape)}")
    whole = nested if nested.lengths() is None else nested.contiguous()  # lengths: there are gaps between its rows
    offsets = whole.offsets()
    lengths = offsets.diff()
    T = int(lengths.max()) if len(lengths) else 0
    runs = torch.arange(T, device=lengths.device) < lengths.unsqueeze(1)  # (B,T)
    row_indices = runs.flatten().nonzero().squeeze(1)
    x = pad(whole.values(), row_indices, *runs.shape)
    x = x if module.batch_first else x.transpose(0, 1)
    output, last, *others = module._forward(x, hx, None, lengths, *rest)
    outputs = [a if module.batch_first else a.transpose(0, 1) for a in (output, *others)]
    first, *inner = [nested_tensor_from_jagged(pack(a, row_indices), offsets) for a in outputs]
    return first, last, *inner
