"""What the host spends on a call of the Triton backend, while the device does nothing.

    python -m benchmarks.gpu.host [--calls 2000]

Kernels are compiled for an H100 and never run: Triton gets a driver whose launches do nothing, and torch's products
return uninitialised memory. Tensors lie on the CPU, so that neither a GPU nor CUDA is needed, and sizes are as small as
they can be, since little but the number of launches depends on them. What a real launch takes comes on top: the call of
CUDA, some 3 us, and for torch's own operations what CUDA adds to them.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.shared import machine
from benchmarks.shared.calls import inference, training
from benchmarks.shared.tables import parser, table
from fastlstm.backends.triton import device as backend

T, B, I = 3, 2, 4
# layer: backend, type, T and H
LAYERS = {f"resident {name}": (f"triton-{name}", torch.float32, T, 32) for name in ("tf32", "ieee")}
LAYERS |= {"resident bf16": ("triton", torch.bfloat16, T, 32)}
LAYERS |= {f"stepwise bf16, {steps} steps": ("triton", torch.bfloat16, steps, 200) for steps in (T, 33)}
UTILITIES = SimpleNamespace(
    load_binary=lambda *_: (0, 0, 0, 0, 1024),  # module, function, registers, spills, threads
    unload_module=lambda module: None,
    get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
)


@contextmanager
def idle(launched: Any = lambda *_: None, stream: Any = lambda device: 0) -> Iterator[None]:
    """Within, the backend takes CPU tensors for those of a GPU, and neither kernels nor products run.

    Args:
        launched: is called in the place of CUDA with what Triton launches a compiled kernel with.
        stream: returns the current stream.
    """
    if backend.INTERPRET:
        raise RuntimeError("benchmarks.gpu.host needs compiled kernels, and TRITON_INTERPRET=1 is in the environment")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from fastlstm.backends.triton import launch  # noqa: F401  # whose kernels read INTERPRET when they are made

    current = {"get_current_device": lambda: 0, "get_current_target": lambda: GPUTarget("cuda", 90, 32)}
    current |= {"get_current_stream": stream, "launcher_cls": lambda source, metadata: launched}
    driver.set_active(SimpleNamespace(utils=UTILITIES, **current))
    try:
        with (
            mock.patch.object(backend, "INTERPRET", True),  # by which it takes CPU tensors
            mock.patch.object(Tensor, "__matmul__", lambda a, b: a.new_empty(*a.shape[:-1], b.shape[-1])),
            mock.patch.object(torch, "addmm", lambda start, a, b: a.new_empty(a.shape[0], b.shape[1])),
            mock.patch.object(nn.functional, "linear", lambda x, w, b=None: x.new_empty(*x.shape[:-1], w.shape[0])),
        ):
            yield
    finally:
        driver._active = None  # Triton's reset_active would look for a GPU


class Empty(torch.autograd.Function):
    """What torch itself takes for a layer: a node of the graph that only allocates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x.new_empty(T, B, 32)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        return None, *(torch.empty_like(weight) for weight in ctx.saved_tensors[1:])


def rows(calls: int) -> Iterator[list[str]]:
    """Yield each layer's least and median of so many calls, in microseconds: other processes only ever add."""
    for name, (named, dtype, steps, H) in {"an empty Function": ("", torch.float32, T, 32), **LAYERS}.items():
        module: Any = fastlstm.LSTM(I, H, backend=named, dtype=dtype) if named else nn.LSTM(I, H)
        x, weights = torch.randn(steps, B, I, dtype=dtype), list(module.parameters())
        forward = (lambda: module(x)[0]) if named else (lambda: Empty.apply(x, *weights))  # noqa: B023
        cells = []
        for run in (inference(forward), forward, training(forward, weights, x.new_ones(steps, B, H))):
            times = [time.perf_counter_ns()]
            for _ in range(calls // 10 + calls):  # the first tenth compiles, and fills caches
                run()
                times.append(time.perf_counter_ns())
            us = [(end - start) / 1e3 for start, end in itertools.pairwise(times)][calls // 10 :]
            cells.append(f"{min(us):.1f}, {statistics.median(us):.1f}")
        yield [name, *cells]


if __name__ == "__main__":
    arguments = parser("gpu.host", __doc__)
    arguments.add_argument("--calls", type=int, default=2000, help="of each kind (2000)")
    torch.set_num_threads(1)
    header = ["least and median, us", "inference", "forward with gradients", "training step"]
    with idle():
        print(machine.header(), "", *table(header, rows(arguments.parse_args().calls)), sep="\n")
