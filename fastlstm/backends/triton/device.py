"""What a device can do, and the precision that torch's settings ask of it."""

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from typing import Any, cast

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")  # as triton reads it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_gpu(device: torch.device) -> bool:
    """Return whether `auto` looks for a GPU's kernels for tensors of this device."""
    return device.type == "cuda"


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability. The interpreter is as large as an H100."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors the device has. The interpreter is as large as an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def import_failure() -> str | None:
    """Return why the package triton cannot be used, or None."""
    if find_spec("triton") is None:
        return "the triton backend needs the package triton, which is not installed"
    try:
        import_module("triton.language")
    except Exception as error:  # of whatever kind: a broken package may raise anything
        return f"the triton backend cannot use the triton that is installed: {type(error).__name__}: {error}"
    return None


def supports(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why these tensors cannot be taken, or None."""
    if dtype not in DTYPES:
        return f"the triton backend needs float32, bfloat16 or float16, got {dtype}"
    if device.type not in ("cuda", "meta", *["cpu"] * INTERPRET):
        return f"the triton backend needs CUDA tensors (or the environment's TRITON_INTERPRET=1), got {device.type}"
    if device.type == "cuda" and torch.version.hip is not None:
        return "the triton backend needs an NVIDIA GPU, this torch is built for ROCm"
    if device.type == "cuda" and (compute := capability(device)) < (8, 0):
        return "the triton backend needs compute capability 8.0, got {}.{}".format(*compute)
    return import_failure()


def resolve_precision(dtype: torch.dtype, precision: str | None) -> str:
    """Return how products are done: "native" in 16 bits; in float32 "ieee" or "tf32", as given or as torch is set."""
    if dtype != torch.float32:
        return "native"
    if precision is None:
        precision = cast(Any, torch.backends.cudnn.rnn).fp32_precision  # cudnn.allow_tf32 sets it too
    return "tf32" if precision == "tf32" else "ieee"


_setting = Lock()  # one layer at a time: the first to leave would undo what the second still needs


def products_in(precision: str) -> AbstractContextManager[object]:
    """Give torch's own products of float32, inside of the context, the precision of the recurrent ones."""
    return nullcontext() if precision == "native" else _products(precision)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Set torch's setting for products of float32, also other threads', and set it back afterwards. The older name
    ``allow_tf32`` sets both names, and cannot be read once they differ: it is used unless the caller has made them
    differ. A setting that equals the general one goes back to "none", which follows it.
    """
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    with _setting:
        before, wanted = matmul.fp32_precision, precision == "tf32"
        if wanted == (before == "tf32"):
            yield
            return
        inherited = before in (backends.cudnn.fp32_precision, backends.fp32_precision)
        older = _older_setting()
        if older is None:
            matmul.fp32_precision = precision
        else:
            matmul.allow_tf32 = wanted
        try:
            yield
        finally:
            if older == "medium":  # of both names, and of products on the CPU
                torch.set_float32_matmul_precision(older)
            elif older is not None:
                matmul.allow_tf32 = not wanted
            matmul.fp32_precision = "none" if inherited else before


def _older_setting() -> str | None:
    """Return torch's setting by its older name, or None where torch refuses to tell."""
    _take_warning()
    try:
        torch.backends.cuda.matmul.allow_tf32  # noqa: B018
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@cache
def _take_warning() -> None:
    """Have torch 2.9 give its only warning of the older name here, since it is no fault of the caller."""
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32  # noqa: B018
