"""What the host spends on a call of the Triton backend, while the device does nothing.

    python -m benchmarks.host [--calls 2000] [--json]

Kernels are compiled for an H100 and never run: Triton gets a driver whose launches do nothing, and torch's products
return uninitialised memory. Tensors lie on the CPU, so that neither a GPU nor CUDA is needed, and sizes are as small as
they can be, since little but the number of launches depends on them. What a real launch takes comes on top: the call of
CUDA, some 3 us, and for torch's own operations what CUDA adds to them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastlstm
from fastlstm.backends.triton import device as backend

T, B, I = 3, 2, 4
RESIDENT, STEPWISE = 32, 200  # H
STEPS = 33  # of the longer one of the two layers that tell what a further launch takes
CAPABILITY = (9, 0)
PRECISIONS = {"bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


class Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class Utilities:
    """What Triton loads a compiled kernel with."""

    @staticmethod
    def load_binary(*arguments: Any) -> tuple[int, ...]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads

    @staticmethod
    def unload_module(module: int) -> None:
        pass

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class Driver:
    """A driver of Triton's for a device that does nothing."""

    launcher_cls, utils = Launcher, Utilities

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def get_current_target() -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def add_product(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@contextmanager
def idle() -> Iterator[None]:
    """Within, the backend takes CPU tensors for those of a GPU, and neither kernels nor products run."""
    if backend.INTERPRET:
        raise RuntimeError("benchmarks.host needs compiled kernels, and TRITON_INTERPRET=1 is in the environment")
    from triton.runtime.driver import driver

    from fastlstm.backends.triton import launch  # noqa: F401  # whose kernels read INTERPRET when they are made

    driver.set_active(Driver())
    try:
        with (
            mock.patch.object(backend, "INTERPRET", True),  # by which it takes CPU tensors
            mock.patch.object(Tensor, "__matmul__", multiply),
            mock.patch.object(torch, "addmm", add_product),
            mock.patch.object(nn.functional, "linear", project),
        ):
            yield
    finally:
        driver._active = None  # Triton's reset_active would look for a GPU


def microseconds(call: Callable[[], object], calls: int) -> dict[str, float]:
    """The least and the median of so many calls: other processes only ever add."""
    for _ in range(calls // 10):
        call()
    times = []
    for _ in range(calls):
        began = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - began) / 1e3)
    return {"least": min(times), "median": statistics.median(times)}


def calls_of(module: nn.Module, steps: int, inputs: int, hidden: int) -> dict[str, Callable[[], object]]:
    """Inference, forward with gradients, and a training step without an optimizer."""
    parameters = list(module.parameters())
    x = torch.randn(steps, B, inputs, dtype=parameters[0].dtype)
    gradient = x.new_ones(steps, B, hidden)

    def inference() -> None:
        with torch.no_grad():
            module(x)

    def forward() -> None:
        module(x)

    def training() -> None:
        torch.autograd.backward((module(x)[0],), (gradient,))
        for parameter in parameters:
            parameter.grad = None

    return {"inference": inference, "forward": forward, "training": training}


class Empty(torch.autograd.Function):
    """What torch itself takes for a layer: a node of the graph that only allocates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(T, B, RESIDENT), x.new_empty(1, B, RESIDENT), x.new_empty(1, B, RESIDENT)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *(torch.empty_like(weight) for weight in ctx.saved_tensors[1:])


class EmptyLayer(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return Empty.apply(x, *self._flat_weights)


def measure(calls: int) -> list[dict[str, Any]]:
    """A row for each layer and kind of call."""
    rows: list[dict[str, Any]] = []

    def take(name: str, timed: dict[str, Callable[[], object]], share: int = 1) -> None:
        rows.extend({"layer": name, "call": key} | microseconds(call, calls // share) for key, call in timed.items())

    with idle():
        take("an empty Function", calls_of(EmptyLayer(I, RESIDENT), T, I, RESIDENT))
        for precision, dtype in PRECISIONS.items():
            name = "triton" if precision == "bf16" else f"triton-{precision}"
            resident = fastlstm.LSTM(I, RESIDENT, backend=name, dtype=dtype)
            take(f"resident {precision}", calls_of(resident, T, I, RESIDENT))
            stepwise = fastlstm.LSTM(I, STEPWISE, backend=name, dtype=dtype)
            take(f"stepwise {precision}, {T} steps", calls_of(stepwise, T, I, STEPWISE))
            take(f"stepwise {precision}, {STEPS} steps", calls_of(stepwise, STEPS, I, STEPWISE), 4)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000, help="of each kind (2000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measure(options.calls)
    if options.json:
        print(*map(json.dumps, rows), sep="\n")
        return
    print("| microseconds, least and median | inference | forward with gradients | training step |\n|---|---|---|---|")
    for name in dict.fromkeys(row["layer"] for row in rows):
        figures = [f"{row['least']:.1f}, {row['median']:.1f}" for row in rows if row["layer"] == name]
        print(f"| {name} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
