"""The choice of a backend: a ladder that a person can read.

`auto` looks at the device first:

* CPU: numba; native where numba cannot keep what it compiles, is not installed or, with a warning, cannot be imported;
  aten, with a warning that says why, where neither can be used.
* CUDA: triton; aten for float64, before compute capability 8.0, on ROCm, and without the package triton.
* Other devices, and projections on any device: aten.

reference takes the calls for which aten lacks something: resets and lengths, all cell states, `vmap` and forward mode,
and heads. It also takes layers of means or heads that triton has no kernels for, with a warning that says why.
On a CPU it also takes calls that a compiler or an exporter traces, where aten would become a graph of all time steps.
An export to ONNX knows no operators of ours, so it takes aten for all calls, and raises if aten lacks something.

bfloat16 tensors take `numba-bf16` by themselves, and `auto` gives long float32 sequences of many rows to
`numba-bf16x6`, see `takes_pieces`. What a backend promises that is asked for by name is in docs/design.md.
"""

import warnings
from functools import lru_cache
from typing import Any

import torch

from fastlstm import torch_private
from fastlstm.backends import aten, native, numba, reference, settings, triton
from fastlstm.backends.base import Layer, Traits, heads_of, hidden_size
from fastlstm.cells.spec import Cell

TRITON = ("triton", "triton-ieee", "triton-tf32")
NUMBA_PRECISIONS = tuple(f"numba-{precision}" for precision in numba.COMPONENTS)
# backends with forward, backward and saved_shape, which run under the autograd Functions
FUSED = ("numba", *NUMBA_PRECISIONS, "native", *TRITON, "reference")
_CPU = ("numba", "native")  # the order in which auto tries them
_MODULES: dict[str, Any] = {
    "numba": numba,
    **{f"numba-{precision}": numba.with_precision(precision) for precision in numba.COMPONENTS},
    "native": native,
    "triton": triton,
    "triton-ieee": triton.with_precision("ieee"),
    "triton-tf32": triton.with_precision("tf32"),
    "reference": reference,
    "aten": aten,
}  # these imports are light: kernels load when first run


MANY_ROWS, MANY_STEPS = 64, 8  # from which six products of bfloat16 take 0.7 to 0.95 of the time of one of float32
MANY_UNITS = 32  # likewise: of 6 to 16 units they take up to 1.2 times as long
MANY_NUMBERS = MANY_ROWS * MANY_STEPS  # of x at least


def takes_pieces(x: torch.Tensor) -> bool:
    """Return whether `auto` may multiply x (T, B, I) of float32 in pieces of bfloat16. A step (B, I) it may not."""
    if x.numel() < MANY_NUMBERS or x.dim() != 3 or x.shape[1] < MANY_ROWS or x.shape[0] < MANY_STEPS:
        return False
    return not settings.invariant()


def sorts_lengths(name: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the backend that runs these tensors is faster if the longest rows come first."""
    name = settings.named(name)
    if name == "auto":  # of the others none is, so that "reference" can stand for all
        name = "numba" if device.type == "cpu" and numba.supports(device, dtype) is None else "reference"
    return traits(name).sorts_lengths


def takes_lengths(name: str | None) -> bool:
    """Return whether a layer of the backend of this name may have lengths. `auto` finds a backend that takes them."""
    return settings.named(name) != "aten"


def module(name: str) -> Any:
    """Return the backend of this name: a module, or an object with the functions of one."""
    return _MODULES[name]


def traits(name: str) -> Traits:
    """Return the traits of the backend of this name."""
    found: Traits = _MODULES[name].TRAITS
    return found


def runs(name: str, cell: Cell) -> bool:
    """Return whether the backend of this name runs layers of a cell."""
    cells = traits(name).cells
    return cells is None or cell.key in cells


# torch's setting for float32 in RNNs on CPUs, and the precision that it takes. Two pieces (16 bits) keep more than
# tf32's 11.
_PRECISIONS = {"bf16": "bf16", "tf32": "bf16x3"}


@torch_private.constant  # as it was when the module was compiled
def _setting() -> str:
    return torch_private.rnn_precision()


def _with_precision(name: str, dtype: torch.dtype, pieces: bool = False) -> str:
    """Return the name of numba with products of bfloat16, if the processor has them: for bfloat16 tensors, and for
    float32 tensors if torch's setting asks for them, or `pieces` does and the setting has nothing against it. Return
    any other `name` as it is.
    """
    if name != "numba" or dtype not in (torch.bfloat16, torch.float32):
        return name
    setting = "bf16" if dtype == torch.bfloat16 else _setting()
    precision = "bf16x6" if pieces and setting == "none" else _PRECISIONS.get(setting)
    if precision is None or numba.COMPONENTS[precision] > numba.max_components():
        return name
    return f"numba-{precision}"


@lru_cache(None)
def _warn_of_cell(cell: Cell, has_heads: bool, reason: str) -> None:
    instead = "torch's own layer" if runs("aten", cell) and not has_heads else "plain PyTorch"
    what = f"layers of several heads of the cell {cell.name}" if has_heads else f"the cell {cell.name}"
    message = f"auto runs {what} in {instead}, since no backend here has a kernel for it: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


_warned = False


def _warn(message: str) -> None:
    global _warned
    if not _warned:  # once, whatever the warning filters say: a layer runs thousands of times
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _order() -> tuple[str, ...]:
    """Return `_CPU`, but native first where each process would compile numba's kernels for itself."""
    return _CPU if numba.cache_folder() is not None else _CPU[::-1]


def _fused_on_cpu(device: torch.device, dtype: torch.dtype, cell: Cell, heads: int, warn: bool) -> str | None:
    """Return the first of numba and native that can run these tensors, or None. Warn if the installation is at fault:
    if numba is broken, or neither can be used.
    """
    taken = next((fused for fused in _order() if _reason(fused, device, dtype, cell, heads) is None), None)
    if not warn:
        return taken
    if taken is None:
        reasons = [module(fused).supports(device, torch.float32) for fused in _CPU]
        if None not in reasons:
            _warn(f"{'; '.join(reasons)}; auto takes aten instead, and reference for what aten lacks")
        elif any(module(fused).supports(device, dtype) is None for fused in _CPU):
            _warn_of_cell(cell, heads > 1, "; ".join(reason for reason in reasons if reason))
    elif taken != "numba" and (failure := numba.failure()) is not None:
        _warn(f"{failure}; auto takes {taken} instead")
    return taken


def _reason(name: str, device: torch.device, dtype: torch.dtype, cell: Cell, heads: int = 1) -> str | None:
    """Return why the backend of this name cannot run these tensors, or layers of a cell with so many heads, or None."""
    reason: str | None = module(name).supports(device, dtype)
    if reason is None and name in TRITON:
        reason = triton.failures.get((device, cell))
    if reason is None and not runs(name, cell):
        reason = f"the {name} backend runs the cells {', '.join(traits(name).cells or ())}, got {cell.name}"
    if reason is None and heads > 1 and not traits(name).heads:
        reason = f"the {name} backend runs layers of one head, got heads={heads}"
    return reason


def choose(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cell: Cell,
    projected: bool,
    masked: bool,
    cells: bool,
    transformed: bool = False,
    traced: bool = False,
    layer: Layer | None = None,
    warn: bool = True,
) -> str:
    """Return the backend that runs a layer with tensors of this device and type.

    Args:
        cell: what one step computes.
        projected, masked, cells: whether the layer has a projection, has resets or lengths, and gives all cell states.
        transformed: whether `vmap` or forward mode is active.
        traced: whether a compiler, an exporter, or `torch.jit.trace` is active.
        layer: the layer itself. Its sizes may decide, see `takes_pieces`, and its kernels may be checked at their first
            use, see `fastlstm.backends.triton.first_call`.
        warn: whether to warn where auto takes another backend than it would in a complete installation.

    Raises:
        RuntimeError: if the backend that was asked for by name cannot run them, with its reason.
        ValueError: for an unknown name.
    """
    name, exports = settings.check_name(settings.named(name)), aten.exports_onnx()
    heads = 1 if layer is None or projected else heads_of(layer)
    lack: str | None = None
    if layer is not None and not projected and (name in TRITON or (name == "auto" and device.type == "cuda")):
        lack = module("triton" if name == "auto" else name).check(layer)
    if name == "auto" and exports:
        name = "aten"
    if name == "auto":
        lacking = masked or cells or transformed or heads > 1 or not runs("aten", cell)  # aten has none of these
        if not projected:
            if device.type in ("cpu", "meta"):
                if (fused := _fused_on_cpu(device, dtype, cell, heads, warn)) is not None:
                    eager = None if traced or transformed else layer
                    pieces = eager is not None and takes_pieces(eager.x) and hidden_size(eager) >= MANY_UNITS
                    return _with_precision(fused, dtype, pieces)
                lacking = lacking or traced
            elif device.type == "cuda" and _reason("triton", device, dtype, cell, heads) is None:
                if lack is None:
                    return "triton"
                if warn:
                    _warn_of_cell(cell, heads > 1, lack)
        return "reference" if lacking else "aten"
    reason = _reason(name, device, dtype, cell, heads) or lack
    if reason is None and projected and name not in ("aten", "reference"):
        reason = f"the {name} backend has no projections (proj_size)"
    if reason is None and name == "aten" and masked:
        reason = "the aten backend has no reset and no lengths"
    if reason is None and name == "aten" and cells:
        reason = "the aten backend does not return the cell states"
    if exports:
        if name != "aten":
            reason = f"this is {name}"
        elif projected:
            reason = "ONNX's LSTM has no projections (proj_size)"
        reason = reason and f"an ONNX export takes the aten backend alone: {reason}"
    if reason is not None:
        raise RuntimeError(reason)
    return _with_precision(name, dtype)
