"""A first call that checks itself, on chips that this project has not measured.

The first use of a kernel variant on a device runs two steps of random numbers beside the reference. Where the results
differ, or the kernel does not start, the backend has failed on that device: there is one RuntimeWarning, `supports` has
a reason against the device from then on, and so `auto` takes torch's own layer or the reference.

A variant is what is compiled apart: a cell, a type and precision, H, up to 32 inputs, which of biases, lengths and
resets there are, and whether gradients are wanted. The direction counts too. The check runs in a thread of its own,
since modes, transforms and settings for gradients, which the call may be under, belong to a thread. It is left out:

* with ``FASTLSTM_CHECK=0`` in the environment,
* while a CUDA graph is captured or a model exported, which what the check does would disturb,
* above `WIDEST` hidden units, where it would take gigabytes,
* where memory does not suffice for it. The next call tries again.
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
from fastlstm.backends.base import Gradients, Layer, Run, hidden_size
from fastlstm.cells.spec import Cell

MEASURED: frozenset[tuple[int, int]] = frozenset()  # capabilities of the chips on which benchmarks.gpu has passed
T, B = 2, 9  # 9 batch rows take a second program of resident kernels, and most of its rows are missing
WIDEST = 2048
# Several times what rounding makes of two steps, relative to the largest value: a wrong result is wrong by more
TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.01, "tf32": 0.01, "ieee": 2e-5}
_checked: set[Variant] = set()
_checking = Lock()


class Variant(NamedTuple):
    """What a check is made of. `present`: for each of the layer's tensors whether it is there."""

    device: torch.device
    cell: Cell
    dtype: torch.dtype
    precision: str
    I: int
    H: int
    present: tuple[bool, ...]
    reverse: bool
    learns: bool


def applies(device: torch.device) -> bool:
    """Whether kernels have to be checked on this device, and can be now."""
    if device.type != "cuda" or os.environ.get("FASTLSTM_CHECK") == "0":
        return False
    if backend.capability(device) in MEASURED:
        return False
    return not (torch.cuda.is_current_stream_capturing() or torch.compiler.is_exporting())


def check(layer: Layer, precision: str) -> None:
    """Check the kernels of a layer at their first use. `backend.failures` then has what was found, by device."""
    device = layer.x.device
    variant = Variant(
        device, layer.cell, layer.x.dtype, precision, min(int(layer.x.shape[-1]), 33), hidden_size(layer),
        tuple([a is not None for a in layer.tensors]), layer.reverse,
        torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in layer.tensors),
    )  # fmt: skip
    if device in backend.failures or variant in _checked or variant.H > WIDEST:
        return
    with _checking:
        if variant in _checked:
            return
        with ThreadPoolExecutor(1) as thread:
            try:
                found = thread.submit(_failure, variant).result()
            except torch.OutOfMemoryError:
                return
        _checked.add(variant)
        if found is None or device in backend.failures:
            return
        backend.failures[device] = f"the triton backend failed its check on {device}: {found}"
    warnings.warn(_report(variant, found), RuntimeWarning, stacklevel=2)


def _failure(variant: Variant) -> str | None:
    """What is wrong with a variant, or None."""
    layer, incoming = _example(variant)
    truth = _flat(layer, incoming, variant, None)
    try:
        found = _flat(layer, incoming, variant, variant.device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, the driver, the device
        return f"{type(error).__name__}: {error}"
    tolerance = TOLERANCES[variant.dtype if variant.precision == "native" else variant.precision]
    for name, wanted in truth.items():
        if (distance := _distance(found[name], wanted)) > tolerance:
            return f"{name} differs from the reference by {distance:.1e} of its largest value"
    return None


def _example(variant: Variant) -> tuple[Layer, Run]:
    """A layer and the gradients of its outputs, on the CPU and in float64, with values that the type can hold.

    The first input is 1 and its weights are 1 or -1, so that no pre-activation is near zero: there the derivative of a
    relu jumps. States begin above zero, since a cell may divide by them.
    """
    generator, cell, I, H = torch.Generator().manual_seed(0), variant.cell, variant.I, variant.H

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    of_x, of_h = cell.gates_of_x * H, cell.gates_of_h * H
    x, weight_ih = random(T, B, I), random(of_x, I, scale=0.15 * I**-0.5)
    x[..., 0], weight_ih[:, 0] = 1, random(of_x).sign()
    tensors: list[Any] = [x, weight_ih, random(of_h, H, scale=0.25 * H**-0.5)]
    tensors += [random(of_x, scale=0.1), random(of_h, scale=0.1)] + [random(H) for _ in cell.params]
    tensors += [random(B, H).abs() for _ in cell.states] + [random(T, B, H) for _ in cell.inputs]
    tensors = [a.to(variant.dtype).double() for a in tensors]
    rows = torch.arange(B)
    tensors += [rows % (T + 1), (torch.arange(T).unsqueeze(1) + rows) % 3 == 0]
    given = [a if there else None for a, there in zip(tensors, variant.present)]
    return Layer.of(cell, given, variant.reverse), Run(
        random(T, B, H).to(variant.dtype).double(), (None,) * len(cell.states), ()
    )


def _flat(layer: Layer, incoming: Run, variant: Variant, device: torch.device | None) -> dict[str, Tensor]:
    """The results by name, and the gradients if they are wanted: of the reference, or of the kernels on a device."""
    names = ["x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", *variant.cell.params]
    names += [f"{name}_0" for name in variant.cell.states] + list(variant.cell.inputs)
    wanted = variant.present[: len(names)]
    gradients: list[Any] = [None] * len(names)
    if device is None:
        tensors = [a if a is None or not a.is_floating_point() else a.requires_grad_() for a in layer.tensors]
        run = reference.forward(layer, False)
        if variant.learns:
            given = [a for a, there in zip(tensors, wanted) if there]
            found = iter(torch.autograd.grad(run.h, given, incoming.h, allow_unused=True))
            gradients = [next(found) if there else None for there in wanted]
    else:
        moved = Layer.of(variant.cell, [_moved(a, variant) for a in layer.tensors], variant.reverse)
        with torch.no_grad():
            run = backend.forward(moved, variant.learns, variant.precision)
            if variant.learns:
                grads, needs = incoming._replace(h=_moved(incoming.h, variant)), Gradients.of(variant.cell, wanted)
                gradients = list(backend.backward(grads, moved, run, needs, variant.precision).flat)
    results = {"the output": run.h}
    results |= {f"{name}_n": a for name, a in zip(variant.cell.states, run.last)}
    results |= {f"the gradient of {name}": a for name, a in zip(names, gradients) if a is not None}
    return {name: a.detach().double().cpu() for name, a in results.items()}


def _moved(a: Any, variant: Variant) -> Any:
    if a is None:
        return None
    return a.detach().to(variant.device, variant.dtype if a.is_floating_point() else a.dtype)


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
        f"the triton backend failed the check of its first call: {found}. From now on auto takes torch's own layer on "
        f"{variant.device}, or plain PyTorch for what torch's layer lacks. Please report this with the following: "
        f"{chip}, capability {'.'.join(map(str, backend.capability(variant.device)))}, "
        f"fastlstm {_version('fastlstm')}, torch {torch.__version__}, triton {_version('triton')}, "
        f"CUDA {torch.version.cuda}; cell {variant.cell.key}, {variant.dtype}, {variant.precision}, "
        f"I {variant.I}, H {variant.H}, {' and '.join(there) or 'no masks'}, "
        f"{'reverse' if variant.reverse else 'forward'}, {'with' if variant.learns else 'without'} gradients. "
        "FASTLSTM_CHECK=0 in the environment turns the check off"
    )
