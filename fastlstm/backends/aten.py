"""torch's own LSTM, for calls that no fused backend supports: projections, devices without a kernel, and ONNX."""

import sys

import torch
from torch import Tensor

from fastlstm.backends.base import Traits
from fastlstm.torch_private import watched

TRAITS = Traits(takes_sixteen_bits=True)


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the backend cannot run, or None."""
    return None  # torch raises its own errors


def exports_onnx() -> bool:
    """Return whether `torch.onnx.export` traces the call, not one in another thread. An export has imported torch.onnx
    already. To import it here would take as long as to import all of this package.
    """
    if "torch.onnx" not in sys.modules or not torch.onnx.is_in_onnx_export():
        return False
    return bool(watched()) or torch.jit.is_tracing()


def forward(
    x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, reverse: bool, has_biases: bool, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one layer in one direction. Return the output (T,B,P), h_n (B,P) and c_n (B,H), as `torch.nn.LSTM` does."""
    if exports_onnx() and not torch.jit.is_tracing():  # the older exporter, which traces, translates torch.lstm itself
        return _onnx_node(x, weights, h_0, c_0, reverse, has_biases)
    if reverse:
        x = x.flip(0)
    # cuDNN needs contiguous states
    y, h_n, c_n = torch.lstm(
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
    # clones, since views cannot be detached in place
    return y.flip(0) if reverse else y, h_n.squeeze(0).clone(), c_n.squeeze(0).clone()


def _onnx_node(
    x: Tensor, weights: list[Tensor], h_0: Tensor, c_0: Tensor, reverse: bool, has_biases: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `forward` as ONNX's own operator. torch's would fix the number of time steps at the example's."""
    (T, B, _), H = x.shape, h_0.shape[1]
    # rows in the order i, o, f, g
    reordered = (torch.cat((a[:H], a[3 * H :], a[H : 3 * H])).unsqueeze(0) for a in weights)
    weight_ih, weight_hh, *biases = reordered
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        (
            x,
            weight_ih,
            weight_hh,
            torch.cat(biases, 1) if has_biases else None,
            None,  # no lengths: all rows are equally long
            h_0.unsqueeze(0),
            c_0.unsqueeze(0),
        ),
        {"direction": "reverse" if reverse else "forward", "hidden_size": H},
        dtypes=(x.dtype,) * 3,
        shapes=((T, 1, B, H), (1, B, H), (1, B, H)),
    )
    return y.squeeze(1), h_n.squeeze(0), c_n.squeeze(0)
