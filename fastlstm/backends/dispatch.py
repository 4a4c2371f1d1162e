"""The choice of a backend: a ladder that a person can read.

`auto` looks at the device first:

* CPU: numba. native where numba cannot keep what it compiles, is not installed or, with a warning, cannot be used;
  aten, with a warning that says why, where neither can be used. Modules of cells ask `aten.runs_step` before.
* CUDA: triton for what aten lacks, for lengths, and for layers that one launch of a kernel runs whole, see
  `triton.is_faster`; otherwise aten. aten also runs float64, and all layers before compute capability 8.0, on ROCm, and
  without a triton that works.
* Other devices, and projections on any device but the CPU: aten.

reference takes the calls for which aten lacks something: resets, all cell states, `vmap` and forward mode, heads, and
lengths in calls that are traced. On a GPU a warning says why, unless the type alone is the reason.
On a CPU it also takes calls that a compiler or an exporter traces, where aten would become a graph of all time steps.
An export to ONNX knows no operators of ours, so it takes aten for all calls, and raises if aten lacks something.

bfloat16 tensors take `numba-bf16` by themselves. `auto` gives long float32 sequences of many rows to `numba-bf16x6`,
and those of float16 to `numba-bf16x3`, see `may_use_components`. A backend may also be asked for by name:
docs/design.md says what it promises.
"""

import warnings
from typing import Any

import torch

from fastlstm import torch_private
from fastlstm.backends import aten, native, numba, onnx, reference, settings, triton
from fastlstm.backends.base import Layer, Traits, heads_of, hidden_size
from fastlstm.backends.triton import device as gpu
from fastlstm.cells.library import lstm_projected
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


def may_use_components(x: torch.Tensor) -> bool:
    """Return whether `auto` may multiply x (T, B, I) of float32 as sums of bfloat16 components; not a step (B, I)."""
    if x.numel() < MANY_NUMBERS or x.dim() != 3 or x.shape[1] < MANY_ROWS or x.shape[0] < MANY_STEPS:
        return False
    return not settings.invariant()


def sorts_lengths(name: str | None, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the backend that runs these tensors is faster if the longest rows come first."""
    name = settings.named(name)
    if name == "auto":
        # no other backend that auto may take is faster with sorted rows, so any of them will do as the answer
        name = "numba" if device.type == "cpu" and numba.supports(device, dtype) is None else "reference"
    return traits(name).sorts_lengths


def takes_lengths(name: str | None) -> bool:
    """Return whether a layer of the backend of this name may have lengths. `auto` finds a backend that takes them."""
    return settings.named(name) != "aten"


def module(name: str) -> Any:
    """Return the backend of this name: a module, or an object with the functions of one."""
    return _MODULES[name]


def traits(name: str) -> Traits:
    backend_traits: Traits = _MODULES[name].TRAITS
    return backend_traits


def runs(name: str, cell: Cell) -> bool:
    """Return whether the backend of this name runs layers of a cell."""
    cells = traits(name).cells
    return cells is None or cell.key in cells


# torch's setting for float32 in RNNs on CPUs, and the precision that it takes. Two bfloat16 components (16 bits) keep
# more than tf32's 11.
_PRECISIONS = {"bf16": "bf16", "tf32": "bf16x3"}


@torch_private.constant  # as it was when the module was compiled
def _setting() -> str:
    return torch_private.rnn_precision()


def _with_precision(name: str, dtype: torch.dtype, components: bool = False) -> str:
    """Return the name of numba with products of bfloat16, if the processor has them: for bfloat16 tensors, for float16
    if `components` is true, and for float32 if torch's setting asks for them, or allows them and `components` is true.
    Return any other `name` as it is.
    """
    if name != "numba" or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return name
    setting = "bf16" if dtype == torch.bfloat16 else "none" if dtype == torch.float16 else _setting()
    precision = _PRECISIONS.get(setting)
    if components and setting == "none":
        precision = "bf16x3" if dtype == torch.float16 else "bf16x6"  # as many components as hold a number exactly
    if precision is None or numba.COMPONENTS[precision] > numba.max_components():
        return name
    return f"numba-{precision}"


_warned: set[str] = set()  # reasons


def _warn(reason: str, message: str) -> None:
    """Warn once for each reason, whatever the warning filters say: a layer runs thousands of times."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _warn_of_layer(cell: Cell, has_heads: bool, name: str, reason: str) -> None:
    """Warn that no kernel runs a layer, and say which backend does."""
    instead = "torch's own layer" if name == "aten" else "plain PyTorch"
    what = "a layer of" if runs("aten", cell) else "the cell"
    what = "layers of several heads of the cell" if has_heads else what
    _warn(reason, f"auto runs {what} {cell.name} in {instead}, since no backend here has a kernel for it: {reason}")


def _fused_on_cpu(device: torch.device, dtype: torch.dtype, cell: Cell, heads: int, warn: bool) -> str | None:
    """Return the first of numba and native that can run these tensors, or None. Warn of a broken installation."""
    order = _CPU if numba.cache_folder() is not None else _CPU[::-1]  # else each process would compile for itself
    taken = next((fused for fused in order if _reason(fused, device, dtype, cell, heads) is None), None)
    if not warn:
        return taken
    if taken is None:
        reasons = [module(fused).supports(device, torch.float32) for fused in _CPU]
        if None not in reasons:
            _warn("cpu", f"{'; '.join(reasons)}; auto takes aten instead, and reference for what aten lacks")
        elif any(module(fused).supports(device, dtype) is None for fused in _CPU):
            name = "aten" if runs("aten", cell) and heads == 1 else "reference"
            _warn_of_layer(cell, heads > 1, name, "; ".join(reason for reason in reasons if reason))
    elif taken != "numba" and (failure := numba.failure()) is not None:
        _warn("cpu", f"{failure}; auto takes {taken} instead")
    return taken


def _triton_lacks(
    device: torch.device, dtype: torch.dtype, cell: Cell, heads: int, layer: Layer | None, aten_computes_all: bool
) -> str | None:
    """Return why `auto` does not take triton, or None; empty where torch's layer, if `aten_computes_all`, is better."""
    reason = _reason("triton", device, dtype, cell, heads)
    if reason is not None or layer is None:
        return reason
    return "" if aten_computes_all and not triton.is_faster(layer) else triton.check(layer)


def _is_expected(device: torch.device, dtype: torch.dtype, lacking: bool) -> bool:
    """Return whether nobody wonders that triton does not run this: float64, and on an old GPU all that aten can."""
    if dtype not in gpu.DTYPES:
        return True
    return not lacking and triton.supports(device, dtype) not in (None, gpu.import_failure())


def _reason(name: str, device: torch.device, dtype: torch.dtype, cell: Cell, heads: int = 1) -> str | None:
    """Return why the backend of this name cannot run these tensors, or layers of a cell with so many heads, or None."""
    reason: str | None = module(name).supports(device, dtype)
    if reason is None and cell is lstm_projected and not traits(name).projections:
        reason = f"the {name} backend has no projections (proj_size)"
    if reason is None and not runs(name, cell):
        reason = f"the {name} backend runs the cells {', '.join(traits(name).cells or ())}, got {cell.name}"
    if reason is None and cell.products and not traits(name).products:
        reason = f"the {name} backend has no products inside a step, got the cell {cell.name}"
    if reason is None and heads > 1 and not traits(name).heads:
        reason = f"the {name} backend runs layers of one head, got heads={heads}"
    return reason


def choose(
    name: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    cell: Cell,
    masked: bool,
    inner_states: bool,
    transformed: bool = False,
    traced: bool = False,
    layer: Layer | None = None,
    warn: bool = True,
) -> str:
    """Return the backend that runs a layer with tensors of this device and type.

    Args:
        cell: what one step computes.
        masked: whether the layer has resets or lengths.
        inner_states: whether the inner states of all steps are wanted.
        transformed: whether `vmap` or forward mode is active.
        traced: whether a compiler, an exporter, or `torch.jit.trace` is active.
        layer: the layer itself. Its sizes may decide, see `may_use_components`, and its kernels may be checked at their
            first use, see `fastlstm.backends.triton.first_call`.
        warn: whether to warn where auto takes another backend than it would in a complete installation.

    Raises:
        RuntimeError: if the backend that was asked for by name cannot run them, with its reason.
        ValueError: for an unknown name.
    """
    name, exports = settings.check_name(settings.named(name)), onnx.is_exporting()
    heads, is_projected = 1 if layer is None else heads_of(layer), cell is lstm_projected
    aten_takes_lengths = masked and layer is not None and layer.reset is None and not transformed and not traced
    aten_takes_lengths = aten_takes_lengths and aten.packs(device)
    if name == "auto" and exports:
        name = "aten"
    if name == "auto":
        # aten has none of these
        lacking = (
            (masked and not aten_takes_lengths) or inner_states or transformed or heads > 1 or not runs("aten", cell)
        )
        if gpu.is_gpu(device) and not is_projected:
            aten_computes_all = not (lacking or masked or traced)
            reason = _triton_lacks(device, dtype, cell, heads, layer, aten_computes_all)
            if reason is None:
                return "triton"
            if reason and warn and not _is_expected(device, dtype, lacking):
                _warn_of_layer(cell, heads > 1, "reference" if lacking else "aten", reason)
        elif device.type in ("cpu", "meta"):
            if (fused := _fused_on_cpu(device, dtype, cell, heads, warn and not is_projected)) is not None:
                eager = None if traced or transformed else layer
                components = eager is not None and may_use_components(eager.x) and hidden_size(eager) >= MANY_UNITS
                return _with_precision(fused, dtype, components)
            lacking = lacking or traced
        return "reference" if lacking else "aten"
    reason = _reason(name, device, dtype, cell, heads)
    if reason is None and name in TRITON and layer is not None:
        reason = module(name).check(layer)
    if reason is None and name == "aten" and masked and not aten_takes_lengths:
        reason = "the aten backend has no reset, and no lengths in calls that are traced, transformed or captured"
    if reason is None and name == "aten" and inner_states:
        reason = "the aten backend does not return the cell states"
    if exports:
        if name != "aten":
            reason = f"this is {name}"
        elif is_projected:
            reason = "ONNX's LSTM has no projections (proj_size)"
        reason = reason and f"an ONNX export takes the aten backend alone: {reason}"
    if reason is not None:
        raise RuntimeError(reason)
    return _with_precision(name, dtype)
