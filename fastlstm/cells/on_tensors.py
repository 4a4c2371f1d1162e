"""The functions of cells on torch tensors, by the names that derived source calls them by.

Compilers look for what a function calls in the module that it belongs to. Derived functions on tensors belong to this
one, so its names are those of the functions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid as log_sigmoid

sigmoid, tanh, relu, exp, where = torch.sigmoid, torch.tanh, torch.relu, torch.exp, torch.where
sqrt, rsqrt, log = torch.sqrt, torch.rsqrt, torch.log


def maximum(a: Any, b: Any) -> Tensor:
    """`torch.maximum`, of which one may be a number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    tensor, number = (a, b) if isinstance(a, Tensor) else (b, a)
    kind = torch.result_type(tensor, number)
    return torch.maximum(tensor.to(kind), torch.full_like(tensor, number, dtype=kind))


def stop_gradient(x: Tensor) -> Tensor:
    """The value, whose derivatives count as zero."""
    return x.detach()


def fill(like: Tensor, value: float) -> Tensor:
    """A number in the type and the shape of a tensor: nothing that authors write."""
    return torch.full_like(like, value)


def mean(x: Tensor) -> Tensor:
    """The mean over the last axis, in the shape of x."""
    return x.mean(-1, keepdim=True).expand_as(x)


def mean_of_head(x: Tensor, heads: int) -> Tensor:
    """The mean over each of so many parts of the last axis, in the shape of x."""
    parts = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    return mean(parts).reshape(x.shape)


_ALL: list[Callable[..., Any]] = [
    sigmoid, tanh, relu, exp, log_sigmoid, maximum, where, stop_gradient, mean, mean_of_head, sqrt, rsqrt, log, fill,
]  # fmt: skip
ON_TENSORS = {function.__name__: function for function in _ALL}
