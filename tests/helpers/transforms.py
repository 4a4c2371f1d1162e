"""What the tests of torch's transforms share: the backends they run over, their dtypes, and how near each must come.

The numba and reference backends are held to float64. The triton backend has no float64 kernels, so it is held to the
same truth in float32, with ``triton-ieee``'s products; on the CPU it runs in Triton's interpreter.
"""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from tests.helpers.layers import TORCH

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is made for Linux on x86-64"
)
TRITON = pytest.param("triton-ieee", marks=needs_triton)
BACKENDS = ("numba", "reference", TRITON)
backends = pytest.mark.parametrize("backend", BACKENDS, indirect=True)
# For what other tests show of triton, too: its interpreter takes seconds, and a GPU does not.
slow_in_the_interpreter = [needs_triton] if torch.cuda.is_available() else [needs_triton, pytest.mark.slow]
backends_but_slow = pytest.mark.parametrize(
    "backend", ["numba", "reference", pytest.param("triton-ieee", marks=slow_in_the_interpreter)], indirect=True
)


def exporting() -> AbstractContextManager[None]:
    """In which torch 2.9, too, exports open sizes with gradients, see docs/limits.md."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False) if TORCH < (2, 10) else nullcontext()


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend.startswith("triton") else torch.float64
