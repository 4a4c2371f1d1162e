"""The functions of cells on torch tensors, by the names that derived source calls them by: compilers look them up in
the module of the function that calls them, and derived functions on tensors belong to this one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid as log_sigmoid

sigmoid, tanh, relu, exp, where = torch.sigmoid, torch.tanh, torch.relu, torch.exp, torch.where
sqrt, rsqrt, log = torch.sqrt, torch.rsqrt, torch.log


def maximum(a: Any, b: Any) -> Tensor:
    """Return `torch.maximum` of two tensors, or of a tensor and a number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    tensor, number = (a, b) if isinstance(a, Tensor) else (b, a)
    kind = torch.result_type(tensor, number)
    return torch.maximum(tensor.to(kind), torch.full_like(tensor, number, dtype=kind))


def stop_gradient(x: Tensor) -> Tensor:
    """Return the value, whose derivatives count as zero."""
    return x.detach()


def fill(like: Tensor, value: float) -> Tensor:
    """Return a number in the type and the shape of a tensor. Authors of cells do not write it."""
    return torch.full_like(like, value)


def mean(x: Tensor) -> Tensor:
    """Return the mean over the last axis, in the shape of x."""
    return x.mean(-1, keepdim=True).expand_as(x)


def mean_of_head(x: Tensor, heads: int) -> Tensor:
    """Return the mean over each of `heads` parts of the last axis, in the shape of x."""
    parts = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    return mean(parts).reshape(x.shape)


def of_heads(equation: str, h: Tensor | None, preact: Tensor | None, weight: Tensor, H: int) -> Tensor:
    """Return an einsum of two of h (..., g, b, k, i), preact (..., g, b, y, k, o) and weights (g, y, k, o, i), given as
    (..., B, H), (..., B, Y H), and (Y H, D) or (G, Y H, D) of heads of D units.
    """
    D, G = weight.shape[-1], weight.shape[0] if weight.dim() == 3 else 1
    parts = [] if h is None else [h.reshape(*h.shape[:-2], G, -1, H // D, D)]
    parts += [] if preact is None else [preact.reshape(*preact.shape[:-2], G, -1, preact.shape[-1] // H, H // D, D)]
    parts += [weight.reshape(G, -1, H // D, D, D)][: 2 - len(parts)]
    return torch.einsum(equation, *parts)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.mT`` for x (..., B, K): each of G stacked weights with its rows, each head with its units."""
    if weight.shape[-1] < x.shape[-1]:
        return of_heads("...gbki,gykoi->...gbyko", x, None, weight, x.shape[-1]).flatten(-3).flatten(-3, -2)
    if weight.dim() == 2:
        return x @ weight.mT
    return (x.unflatten(-2, (weight.shape[0], -1)) @ weight.mT).flatten(-3, -2)


def transposed_product(*args: Tensor) -> Tensor:
    """Return the sum of ``gradient @ weight`` over pairs of a gradient and a weight, as `product` has it."""
    pairs = zip(args[::2], args[1::2])
    return sum(product(a, _transposed(w)) for a, w in pairs)  # type: ignore[return-value]


def _transposed(weight: Tensor) -> Tensor:
    """Return a product's weight (P, H) as (H, P), or with the weight (D, D) of each head transposed."""
    if weight.shape[-2] < weight.shape[-1]:
        return weight.mT
    return weight.unflatten(-2, (-1, weight.shape[-1])).mT.flatten(-3, -2)


_ALL: list[Callable[..., Any]] = [
    sigmoid, tanh, relu, exp, log_sigmoid, maximum, where, stop_gradient, mean, mean_of_head, sqrt, rsqrt, log, fill,
    product, transposed_product,
]  # fmt: skip
ON_TENSORS = {function.__name__: function for function in _ALL}
