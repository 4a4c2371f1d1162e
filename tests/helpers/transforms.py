"""What the tests of torch's transforms share: the backends they run over, their dtypes, and how near each must come.

The numba and reference backends are held to float64. The triton backend has no float64 kernels, so it is held to the
same truth in float32, with ``triton-ieee``'s products; on the CPU it runs in Triton's interpreter.
"""

import importlib.util
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from tests.helpers.layers import TORCH, error

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is made for Linux on x86-64"
)
TRITON = pytest.param("triton-ieee", marks=needs_triton)
BACKENDS = ("numba", "reference", TRITON)
backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
# Of the largest value. float64: a few thousand roundings. float32: those of products of 22 bits and of several sums of
# both signs, one for each derivative, in tensors of a few dozen values, whose largest may be less than their terms.
BOUNDS = {torch.float64: 1e-11, torch.float32: 3e-5}


def exporting() -> AbstractContextManager[None]:
    """In which torch 2.9, too, exports open sizes with gradients, see docs/transforms.md."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False) if TORCH < (2, 10) else nullcontext()


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend.startswith("triton") else torch.float64


def assert_near(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    """Every tensor of `got`, in the dtype it was computed in, near its float64 twin."""
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        assert error(a, b) < BOUNDS[a.dtype], n
