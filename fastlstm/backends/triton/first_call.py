"""The first call of a kernel variant on a device, which finds out whether its kernels run, and run right.

Before it the kernels are compiled and loaded: a broken triton, a missing C compiler, a cache that cannot be written,
and a kernel that is too large for the device all show here. Then, on a chip that this project has not measured, they
run two steps of random numbers, and the results are compared with the reference, but for what is infinite or NaN there
too in the layer's own type.

A failure is permanent: from then on `failure` gives a reason for all layers of this cell, type, size and number of
heads on this device, and `auto` takes torch's own layer or the reference.

A variant is what Triton compiles for itself: a cell, a type and precision, the tile, H, how many heads, which of
biases, states, lengths and resets there are, and whether gradients are wanted. Both steps run in a thread of their own,
since the modes, transforms and settings of the call belong to its thread. The comparison is left out:

* with ``FASTLSTM_CHECK=0`` in the environment,
* while a CUDA graph is captured or a model exported, which the comparison would disturb,
* above `WIDEST` hidden units, where it would take gigabytes,
* if memory does not suffice for it, or torch forbids to wait for the device. Calls of other signatures try again,
* for programs of 16 rows, where kernels are chosen before the number of rows is known: under vmap and in a compiled
  graph of open sizes. They are compiled at their first launch.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlstm.backends import reference
from fastlstm.backends.base import Gradients, Layer, Run, heads_of
from fastlstm.backends.triton import device as devices
from fastlstm.backends.triton import launch, tiles
from fastlstm.backends.triton.backward_pass import Backward
from fastlstm.backends.triton.launch import Forward
from fastlstm.cells.spec import Cell

MEASURED: frozenset[tuple[int, int]] = frozenset()  # capabilities of the chips on which benchmarks.gpu has passed
T = 2
WIDEST = 2048
# Several times what rounding makes of two steps, relative to the largest value: a wrong result is wrong by more
TOLERANCES = {torch.bfloat16: 0.05, torch.float16: 0.01, "tf32": 0.01, "ieee": 2e-5}
# Parts of messages of a RuntimeError that is no fault of a kernel: no memory, or `torch.cuda.set_sync_debug_mode`
TRANSIENT = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "synchronizing")
failures: dict[Kind, str] = {}  # the reason for each kind of layer whose kernels have failed
_reports: dict[tuple[torch.device, str], str] = {}  # the first for each reason: one warning is enough
_passed: set[Variant] = set()
_checking = Lock()


class Kind(NamedTuple):
    """The layers that are given up together, after the failure of one of them."""

    device: torch.device
    cell: Cell
    dtype: torch.dtype
    precision: str
    H: int
    heads: int


class Variant(NamedTuple):
    """The kernels that Triton compiles for one kind of layers, with these tensors `present`; maybe `compared`."""

    kind: Kind
    tile: tiles.Tile
    present: tuple[bool, ...]
    wants_gradients: bool
    compared: bool


def compares(device: torch.device) -> bool:
    """Return whether results have to be compared on this device, and can be now."""
    if not devices.is_gpu(device) or os.environ.get("FASTLSTM_CHECK") == "0":
        return False
    if devices.capability(device) in MEASURED:
        return False
    return not (torch.cuda.is_current_stream_capturing() or torch.compiler.is_exporting())


def failure(layer: Layer, precision: str) -> str | None:
    """Return why the kernels of a layer do not run right on its device, or None. The first call of a variant tries."""
    _, tile, _, _, H, _ = launch.describe_layer(layer, precision)
    kind = Kind(layer.x.device, layer.cell, layer.x.dtype, precision, H, heads_of(layer))
    if kind in failures or not devices.is_gpu(kind.device):
        return failures.get(kind)
    wants_gradients = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in layer.tensors)
    present, compared = tuple([a is not None for a in layer.tensors]), H <= WIDEST and compares(kind.device)
    variant, I = Variant(kind, tile, present, wants_gradients, compared), int(layer.x.shape[-1])
    with _checking:
        if variant not in _passed and kind not in failures:
            with ThreadPoolExecutor(1) as thread:
                try:
                    failed = thread.submit(_failure, variant, max(1, min(I, 33))).result()
                except Exception as error:
                    if _is_transient(error):
                        return None
                    raise
            if failed is None:
                _passed.add(variant)
            else:
                reason = kind.device, re.sub(r"/\S*|\n.*", "", failed)  # paths and later lines may be of one kernel
                failures[kind] = _reports.setdefault(reason, _report(variant, failed))
    return failures.get(kind)


def _is_transient(error: Exception) -> bool:
    """Return whether the error is no fault of the kernels, so that a later check may succeed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in TRANSIENT)


def _failure(variant: Variant, I: int) -> str | None:
    device, precision, meta = variant.kind.device, variant.kind.precision, torch.device("meta")
    try:
        with launch.on_device(device):
            _flat(*_converted(_example(variant, I, "meta"), variant, meta), variant, True)  # which loads the kernels
        if not variant.compared:
            return None
        example = _example(variant, I, "cpu")
        results = _flat(*_converted(example, variant, device), variant, True)
    except Exception as error:  # of the compiler, the cache, the driver, the device
        if _is_transient(error):
            raise
        return f"{type(error).__name__}: {error}"
    truth = _flat(*example, variant, False)
    tolerance = TOLERANCES[variant.kind.dtype if precision == "native" else precision]
    wrong = {name: d for name, wanted in truth.items() if not (d := _distance(results[name], wanted)) <= tolerance}
    if not wrong:
        return None
    likewise = _flat(*_converted(example, variant, torch.device("cpu")), variant, False)
    for name, distance in wrong.items():
        if likewise[name].isfinite().all():
            return f"{name} differs from the reference by {distance:.1e} of its largest value"
    return None


def _example(variant: Variant, I: int, device_name: str) -> tuple[Layer, Run]:
    """Return a layer and the gradients of its outputs, on "cpu" or "meta", in float64 and rounded to the layer's type.

    The first input is 1 and its weights are 1 or -1, so that no pre-activation is near zero: there the derivative of a
    relu jumps. States are above zero, and params and inputs from 0.5 to 1.5, since a cell may divide by them.
    """
    options: dict[str, Any] = {"device": device_name}
    options |= {"generator": torch.Generator().manual_seed(0)} if device_name == "cpu" else {}
    _, cell, dtype, _, H, heads = variant.kind
    B, D = variant.tile.block_b + 1, H // heads  # a second program, most of whose rows are missing

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, **options)

    def near_one(*shape: int) -> Tensor:
        return 0.5 + torch.rand(shape, **options)

    x_rows, h_rows = cell.gates_of_x * H, cell.gates_of_h * H
    x, weight_ih = random(T, B, I), random(x_rows, I, scale=0.15 * I**-0.5)
    x[..., 0], weight_ih[:, 0] = 1, random(x_rows).sign()
    tensors: list[Any] = [x, weight_ih, random(h_rows, D, scale=0.25 * D**-0.5)]
    tensors += [random(x_rows, scale=0.1), random(h_rows, scale=0.1)] + [near_one(H) for _ in cell.params]
    tensors += [random(H, D, scale=0.25 * D**-0.5) for _ in cell.products]
    tensors += [random(B, H).abs() for _ in cell.states] + [near_one(T, B, H) for _ in cell.inputs]
    tensors = [a.to(dtype).double() for a in tensors]
    rows = torch.arange(B, device=device_name)
    tensors += [rows % (T + 1), (torch.arange(T, device=device_name).unsqueeze(1) + rows) % 3 == 0]
    tensors = [a if there else None for a, there in zip(tensors, variant.present)]
    return Layer.of(cell, tensors, False), Run(random(T, B, H).to(dtype).double(), (None,) * len(cell.states), ())


def _converted(example: tuple[Layer, Run], variant: Variant, device: torch.device) -> tuple[Layer, Run]:
    """Return an example on a device and in the variant's own type."""
    layer, incoming = example

    def converted(a: Any) -> Any:
        return a if a is None else a.detach().to(device, variant.kind.dtype if a.is_floating_point() else a.dtype)

    layer = Layer.of(variant.kind.cell, [converted(a) for a in layer.tensors], layer.reverse)
    return layer, incoming._replace(h=converted(incoming.h))


def _flat(layer: Layer, incoming: Run, variant: Variant, by_kernels: bool) -> dict[str, Tensor]:
    """Return the results by name, and the gradients if they are wanted, of the kernels or of the reference."""
    cell, precision, tile = variant.kind.cell, variant.kind.precision, variant.tile
    names = ["x", "weight_ih", "weight_hh", "bias_ih", "bias_hh", *cell.params]
    names += [f"weight_{name}" for name in cell.products]
    names += [f"{name}_0" for name in cell.states] + list(cell.inputs)
    wanted = variant.present[: len(names)]
    gradients: list[Any] = [None] * len(names)
    if by_kernels:
        with torch.no_grad():
            run = Forward(layer, variant.wants_gradients, precision, tile=tile).run(layer)
            if variant.wants_gradients:
                needs = Gradients.of(cell, wanted)
                gradients = list(Backward(layer, needs, precision, tile).run(incoming, layer, run).flat)
    else:
        tensors = [a if a is None or not a.is_floating_point() else a.requires_grad_() for a in layer.tensors]
        run = reference.forward(layer, False)
        if variant.wants_gradients:
            leaves = [a for a, there in zip(tensors, wanted) if there]
            of_leaves = iter(torch.autograd.grad(run.h, leaves, incoming.h, allow_unused=True))
            gradients = [next(of_leaves) if there else None for there in wanted]
    results = {"the output": run.h}
    results |= {f"{name}_n": a for name, a in zip(cell.states, run.last)}
    results |= {f"the gradient of {name}": a for name, a in zip(names, gradients) if a is not None}
    return {name: a.detach().double().cpu() for name, a in results.items() if not a.is_meta}


def _distance(result: Tensor, wanted: Tensor) -> float:
    """Return the largest difference divided by the largest wanted value. NaN counts as infinitely wrong."""
    return float(((result - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)).nan_to_num(nan=float("inf")))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # it is imported from a folder that nothing has installed
        return "of no known version"


def _report(variant: Variant, failed: str) -> str:
    device, cell, dtype, precision, H, heads = variant.kind
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    masks = [name for name, there in zip(("lengths", "reset"), variant.present[-2:]) if there]
    circumstances = (
        chip, f"capability {'.'.join(map(str, devices.capability(device)))}", f"fastlstm {_version('fastlstm')}",
        f"torch {torch.__version__}", f"triton {_version('triton')}", f"CUDA {torch.version.cuda}", f"cell {cell.key}",
        dtype, precision, f"H {H}", f"heads {heads}", variant.tile, *masks, "gradients" * variant.wants_gradients,
    )  # fmt: skip
    text = ", ".join(str(part) for part in circumstances if part)
    return (
        f"the triton backend failed its first call on {device}: {failed}. Please report this with the following: {text}"
    )
