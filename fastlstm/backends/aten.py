"""torch's own LSTM, for what no fused backend supports: projections, and devices that have no kernel of ours."""

import torch
from torch import Tensor


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these tensors cannot be taken, or None."""
    return None  # torch says what it cannot do


def forward(
    x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, reverse: bool, has_biases: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer in one direction: output (T,B,P), h_n (B,P), c_n (B,H). Equivalent to `torch.nn.LSTM`'s forward."""
    if reverse:
        x = x.flip(0)
    # cuDNN refuses other states
    y, h_n, c_n = torch._VF.lstm(
        x,
        (h_0.unsqueeze(0).contiguous(), c_0.unsqueeze(0).contiguous()),
        weights,
        has_biases,
        1,
        0.0,
        train,
        False,
        False,
    )
    # a view could not be detached in place
    return y.flip(0) if reverse else y, h_n.squeeze(0).clone(), c_n.squeeze(0).clone()
