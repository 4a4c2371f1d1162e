"""A first call that checks itself, on chips that this project has not measured.

The first use of a kernel variant on a device runs two steps of random numbers beside the reference. Where the results
differ, or the kernel does not start, the backend has failed for this cell on that device: there is one RuntimeWarning,
`failures` has a reason from then on, and so `auto` takes torch's own layer or the reference. Results that are infinite
or NaN in the reference too, if it computes in the layer's own type, say nothing and are left out.

A variant is what is compiled apart: a cell, a type and precision, H, how many heads, what I is padded to where a kernel
multiplies x, which of biases, lengths and resets there are, and whether gradients are wanted. The check runs in a
thread of its own, since modes, transforms and settings for gradients, which the call may be under, belong to a thread.
It is left out:

* with ``FASTLSTM_CHECK=0`` in the environment,
* while a CUDA graph is captured or a model exported, which what the check does would disturb,
* above `WIDEST` hidden units, where it would take gigabytes,
* where memory does not suffice for it, or torch forbids to wait for the device. Calls of other
  signatures try again.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Gradients, Layer, Run, heads_of
from fastlstm.backends.triton import launch, tiles
from fastlstm.cells.spec import Cell

MEASURED: frozenset[tuple[int, int]] = frozenset()  # capabilities of the chips on which benchmarks.gpu has passed
T, B = 2, 9  # 9 batch rows take a second program of resident kernels, and most of its rows are missing
WIDEST = 2048
# Several times what rounding makes of two steps, relative to the largest value: a wrong result is wrong by more
TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.01, "tf32": 0.01, "ieee": 2e-5}
# What messages of a RuntimeError say that is no fault of a kernel: no memory, or `torch.cuda.set_sync_debug_mode`
PASSING = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "synchronizing")
_checked: set[Variant] = set()
_checking = Lock()


class Variant(NamedTuple):
    """What a check is made of.

    Attributes:
        padded: what I is padded to where a kernel multiplies x, else 0.
        present: for each of the layer's tensors whether it is there.
    """

    device: torch.device
    cell: Cell
    dtype: torch.dtype
    precision: str
    padded: int
    H: int
    heads: int
    present: tuple[bool, ...]
    learns: bool


def applies(device: torch.device) -> bool:
    """Whether kernels have to be checked on this device, and can be now."""
    if device.type != "cuda" or os.environ.get("FASTLSTM_CHECK") == "0":
        return False
    if backend.capability(device) in MEASURED:
        return False
    return not (torch.cuda.is_current_stream_capturing() or torch.compiler.is_exporting())


def check(layer: Layer, precision: str) -> None:
    """Check the kernels of a layer at their first use. `backend.failures` then has what was found."""
    device, I = layer.x.device, int(layer.x.shape[-1])
    _, tile, _, _, H, _ = launch.cut(layer, precision)
    multiplies = isinstance(tile, tiles.Resident) and layer.weights[0] is not None
    variant = Variant(
        device, layer.cell, layer.x.dtype, precision,
        tiles.padded_input(I, tile.P, precision, backend.capability(device)) if multiplies else 0,
        H, heads_of(layer), tuple([a is not None for a in layer.tensors]),
        torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in layer.tensors),
    )  # fmt: skip
    if _is_known(variant) or H > WIDEST:
        return
    with _checking:
        if _is_known(variant):
            return
        with ThreadPoolExecutor(1) as thread:
            try:
                found = thread.submit(_failure, variant, min(I, 33)).result()
            except RuntimeError as error:
                if _passes(error):
                    return
                raise
        if found is not None:  # before others may take the variant for one that has passed
            failure = f"the triton backend failed its check of {variant.cell.key} on {device}: {found}"
            backend.failures[device, variant.cell] = failure
        _checked.add(variant)
    if found is not None:
        warnings.warn(_report(variant, found), RuntimeWarning, stacklevel=2)


def _is_known(variant: Variant) -> bool:
    return (variant.device, variant.cell) in backend.failures or variant in _checked


def _passes(error: Exception) -> bool:
    """Whether a later check may find what this one could not."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in PASSING)


def _failure(variant: Variant, I: int) -> str | None:
    """What is wrong with a variant, or None."""
    layer, incoming = _example(variant, I)
    truth = _flat(layer, incoming, variant, False)
    try:
        found = _flat(*_converted(layer, incoming, variant, variant.device), variant, True)
    except Exception as error:  # of the compiler, the driver, the device
        if _passes(error):
            raise
        return f"{type(error).__name__}: {error}"
    tolerance = TOLERANCES[variant.dtype if variant.precision == "native" else variant.precision]
    wrong = {name: d for name, wanted in truth.items() if not (d := _distance(found[name], wanted)) <= tolerance}
    if not wrong:
        return None
    likewise = _flat(*_converted(layer, incoming, variant, torch.device("cpu")), variant, False)
    for name, distance in wrong.items():
        if likewise[name].isfinite().all():
            return f"{name} differs from the reference by {distance:.1e} of its largest value"
    return None


def _example(variant: Variant, I: int) -> tuple[Layer, Run]:
    """A layer and the gradients of its outputs, on the CPU and in float64, with values that the type can hold.

    The first input is 1 and its weights are 1 or -1, so that no pre-activation is near zero: there the derivative of a
    relu jumps. States begin above zero, and params and the cell's inputs are from 0.5 to 1.5, since a cell may divide
    by them.
    """
    generator, cell, H = torch.Generator().manual_seed(0), variant.cell, variant.H
    D = H // variant.heads

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    def near_one(*shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, generator=generator)

    of_x, of_h = cell.gates_of_x * H, cell.gates_of_h * H
    x, weight_ih = random(T, B, I), random(of_x, I, scale=0.15 * I**-0.5)
    x[..., 0], weight_ih[:, 0] = 1, random(of_x).sign()
    tensors: list[Any] = [x, weight_ih, random(of_h, D, scale=0.25 * D**-0.5)]
    tensors += [random(of_x, scale=0.1), random(of_h, scale=0.1)] + [near_one(H) for _ in cell.params]
    tensors += [random(B, H).abs() for _ in cell.states] + [near_one(T, B, H) for _ in cell.inputs]
    tensors = [a.to(variant.dtype).double() for a in tensors]
    rows = torch.arange(B)
    tensors += [rows % (T + 1), (torch.arange(T).unsqueeze(1) + rows) % 3 == 0]
    given = [a if there else None for a, there in zip(tensors, variant.present)]
    return Layer.of(cell, given, False), Run(random(T, B, H).to(variant.dtype).double(), (None,) * len(cell.states), ())


def _converted(layer: Layer, incoming: Run, variant: Variant, device: torch.device) -> tuple[Layer, Run]:
    """An example on a device and in the variant's own type."""

    def converted(a: Any) -> Any:
        return a if a is None else a.detach().to(device, variant.dtype if a.is_floating_point() else a.dtype)

    layer = Layer.of(variant.cell, [converted(a) for a in layer.tensors], layer.reverse)
    return layer, incoming._replace(h=converted(incoming.h))


def _flat(layer: Layer, incoming: Run, variant: Variant, by_kernels: bool) -> dict[str, Tensor]:
    """The results by name, and the gradients if they are wanted, of the kernels or of the reference."""
    names = ["x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", *variant.cell.params]
    names += [f"{name}_0" for name in variant.cell.states] + list(variant.cell.inputs)
    wanted = variant.present[: len(names)]
    gradients: list[Any] = [None] * len(names)
    if by_kernels:
        with torch.no_grad():
            run = backend.forward(layer, variant.learns, variant.precision)
            if variant.learns:
                needs = Gradients.of(variant.cell, wanted)
                gradients = list(backend.backward(incoming, layer, run, needs, variant.precision).flat)
    else:
        tensors = [a if a is None or not a.is_floating_point() else a.requires_grad_() for a in layer.tensors]
        run = reference.forward(layer, False)
        if variant.learns:
            given = [a for a, there in zip(tensors, wanted) if there]
            found = iter(torch.autograd.grad(run.h, given, incoming.h, allow_unused=True))
            gradients = [next(found) if there else None for there in wanted]
    results = {"the output": run.h}
    results |= {f"{name}_n": a for name, a in zip(variant.cell.states, run.last)}
    results |= {f"the gradient of {name}": a for name, a in zip(names, gradients) if a is not None}
    return {name: a.detach().double().cpu() for name, a in results.items()}


def _distance(found: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest value there should be. NaN counts as infinitely wrong."""
    return float(((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)).nan_to_num(nan=float("inf")))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # it is imported from a folder that nothing has installed
        return "of no known version"


def _report(variant: Variant, found: str) -> str:
    cuda = variant.device.type == "cuda"
    chip = torch.cuda.get_device_name(variant.device) if cuda else variant.device.type
    there = [name for name, has in zip(("lengths", "reset"), variant.present[-2:]) if has]
    return (
        f"the triton backend failed the check of its first call: {found}. From now on auto takes torch's own layer for "
        f"this cell on {variant.device}, or plain PyTorch for what torch's layer lacks. Please report this with the "
        f"following: {chip}, capability {'.'.join(map(str, backend.capability(variant.device)))}, "
        f"fastlstm {_version('fastlstm')}, torch {torch.__version__}, triton {_version('triton')}, "
        f"CUDA {torch.version.cuda}; cell {variant.cell.key}, {variant.dtype}, {variant.precision}, "
        f"I padded to {variant.padded}, H {variant.H}, heads {variant.heads}, {' and '.join(there) or 'no masks'}, "
        f"{'with' if variant.learns else 'without'} gradients. "
        "FASTLSTM_CHECK=0 in the environment turns the check off"
    )
