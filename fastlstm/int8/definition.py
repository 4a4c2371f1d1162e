"""What int8 layers compute, in plain PyTorch: the truth for the kernels of csrc/, which devices without these run.

An int8 layer is a `Layer` with `scales` and `activations`, whose weight_ih (X H, I) and weight_hh (Y H, H) are int8.

**What is computed.** A row of x, or of h, is rounded to integers q of at most `TOP` with a scale of its own::

    m = max|row|, of h at least 1       scale = m / TOP       q = round_half_even(row * (TOP / m))

A row with infinity or NaN has NaN for a scale, and a row of x below 2^-100 counts as zeros. Sums of products are exact.
With 16 bits q is 256 hi + lo, bytes both, with sums of their own: s = 256 s_hi + s_lo. Then, fused::

    preact = s_x * (weight_ih_scale * scale_x) + bias,   preact = s_h * (weight_hh_scale * scale_h) + preact

Everything else is float32.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from fastlstm.backends import reference
from fastlstm.backends.base import Layer, Run, heads_of
from fastlstm.backends.layer_checks import check_layer
from fastlstm.backends.sums import Sums, in_order

Optional = Tensor | None
Activations = Literal["int8", "int16"]
BITS = {"int8": 8, "int16": 16}
TOP = {8: 127, 16: 127 * 256}  # the largest number, by the bits of activations
MOST_COLUMNS = 1 << 16  # of which 127 times 128 in each fit into int32
SMALLEST = 2.0**-100
_BLOCK = 512  # columns whose sums are exact in float32


def check_activations(activations: Any) -> None:
    """Raise ValueError unless the argument is "int8" or "int16"."""
    if activations not in BITS:
        raise ValueError(f"activations must be 'int8' or 'int16', got {activations!r}")


def quantize_weight(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Round a weight to int8, symmetrically, with one scale for each row.

    Args:
        weight: (rows, columns), of any floating-point type.
        name: what the error calls it.

    Returns:
        The numbers, int8 (rows, columns) from -127 to 127, and the scales, float32 (rows,): the largest magnitude of
        the row divided by 127, or 1 for a row of zeros. A number times its scale is the weight, rounded.

    Raises:
        ValueError: if the weight has infinity or NaN, or another shape, or more than 65536 columns, or is on the device
            meta.
    """
    if weight.dim() != 2 or weight.shape[1] > MOST_COLUMNS:
        raise ValueError(f"{name} must have shape (rows, columns) with columns <= 65536, got {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"{name} must be on a device that holds numbers to round to int8, got the device meta")
    weight = weight.detach().float()
    largest = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    if not bool(largest.isfinite().all()):
        raise ValueError(f"{name} must be finite to be rounded to int8, got infinity or NaN")
    scale = torch.where(largest == 0, 1.0, largest / 127)
    scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)  # a row of less than any scale
    numbers = (weight / scale.unsqueeze(1)).round().clamp(-127, 127)
    return numbers.to(torch.int8), scale


def check(layer: Layer) -> None:
    """Raise ValueError unless the tensors make one int8 layer in one direction, of a cell without means over units."""
    x, weights = layer.x, layer.weights
    if layer.cell.derived().means or layer.cell.products:
        raise ValueError(f"an int8 layer must be of a cell without means over units, got {layer.cell.name}")
    if x.dtype is not torch.float32:
        raise ValueError(f"x must have the dtype torch.float32, got {x.dtype}")
    for name, weight, scale in zip(("weight_ih", "weight_hh"), weights[:2], layer.scales):
        if weight.dtype is not torch.int8:
            raise ValueError(f"{name} must have the dtype torch.int8, got {weight.dtype}")
        if scale.shape != weight.shape[:1] or scale.dtype is not torch.float32:
            shape = tuple(weight.shape[:1])
            raise ValueError(f"{name}_scale must be torch.float32 {shape}, got {scale.dtype} {tuple(scale.shape)}")
        if weight.device != x.device or scale.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {weight.device} and {scale.device}")
        if weight.shape[1] > MOST_COLUMNS:
            raise ValueError(f"{name} must have at most {MOST_COLUMNS} columns, got {weight.shape[1]}")
        if weight.numel() and weight.data_ptr() and weight.min() == -128:  # which AVX2 cannot negate
            raise ValueError(f"{name} must have numbers from -127 to 127, got -128")
    like = (x.new_empty(1, 1).expand(weight.shape) for weight in weights[:2])
    check_layer(layer._replace(weights=(*like, *weights[2:])))
    if heads_of(layer) > 1:
        raise ValueError(f"an int8 layer must have one head, got a weight_hh of {heads_of(layer)}")


def rounded(a: Tensor, activations: int, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the numbers of rows (..., K), integers in float32, and the rows' scales (..., 1), by `least` or more."""
    largest = a.abs().amax(-1, keepdim=True) if a.shape[-1] else a.new_zeros(*a.shape[:-1], 1)
    largest = largest.clamp(min=least)  # NaN stays NaN
    top = torch.full_like(largest, TOP[activations])  # torch divides a number by a tensor in two roundings
    finite, small = largest.isfinite(), largest < SMALLEST
    scale = (largest / top).masked_fill(small, 0).masked_fill(~finite, float("nan"))
    inverse = (top / largest).masked_fill(small | ~finite, 0)
    return (a.masked_fill(~finite, 0) * inverse).round(), scale


def products(numbers: Tensor, weight: Any, activations: int) -> Tensor:
    """Return the sums of products of numbers (..., K) with a weight of int8 (R, K), in float32 (..., R)."""
    if activations == 16:
        high = ((numbers + 128) / 256).floor()
        return products(high, weight, 8) * 256 + products(numbers - 256 * high, weight, 8)
    total = torch.zeros(*numbers.shape[:-1], weight.shape[0], dtype=torch.int32, device=numbers.device)
    for first in range(0, weight.shape[1], _BLOCK):
        columns = slice(first, first + _BLOCK)
        total += (numbers[..., columns] @ weight[:, columns].to(numbers.dtype).mT).to(torch.int32)
    return total.to(numbers.dtype)


class Int8Sums(Sums):
    """The weights of an int8 layer in the order of its cell's sums."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.cell, layer.weights, layer.weights[1].shape[1])
        scale_ih, scale_hh = layer.scales
        self.scale_ih: Any = in_order(scale_ih, self.layout.blocks_ih, -1)
        self.scale_hh: Any = in_order(scale_hh, self.layout.blocks_hh, -1)
        self.activations = layer.activations

    def product_ih(self, x: Tensor) -> Optional:
        numbers, scales = rounded(x, self.activations)
        return products(numbers, self.weight_ih, self.activations) * (self.scale_ih * scales)

    def product_hh(self, h: Tensor) -> Optional:
        numbers, scales = rounded(h, self.activations, 1.0)
        return products(numbers, self.weight_hh, self.activations) * (self.scale_hh * scales)


def forward(layer: Layer) -> Run:
    """Return the results of one int8 layer in one direction, which keep nothing."""
    return reference.forward_with(Int8Sums(layer), layer, False)
