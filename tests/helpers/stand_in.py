"""Stands in for a CUDA device, so that the GPU benchmark's own lines run where there is none.

As a plugin, `pytest -p tests.helpers.stand_in benchmarks/test_gpu.py` under TRITON_INTERPRET=1 runs the GPU's
benchmarks on a tiny layer on the CPU. What torch.cuda has no name for cannot be replaced, so misspelt names still fail.
"""

import contextlib
import time

import pytest
import torch

from benchmarks import gpu_layers


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class CUDAGraph:
    def replay(self):
        time.sleep(1e-5)


class Bench(gpu_layers.Bench):
    def __init__(self, shape, precision, device, names):
        super().__init__(shape, precision, "cpu", names)


def install(monkeypatch):
    for name, value in {
        "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "current_stream": Stream,
        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext, "synchronize": lambda: None,
        "is_available": lambda: True, "get_device_name": lambda: "A card",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_layers, "is_cuda", lambda device: True)
    monkeypatch.setattr(gpu_layers, "FLUSH", 1)
    monkeypatch.setattr(gpu_layers, "Bench", Bench)


def pytest_configure(config):
    monkeypatch = pytest.MonkeyPatch()
    config.add_cleanup(monkeypatch.undo)
    install(monkeypatch)
    monkeypatch.setattr(gpu_layers, "SHAPES", gpu_layers.TINY[:1])
    # the interpreter multiplies bf16 as integers, and nn.LSTM knows no fp16 on a CPU
    monkeypatch.setattr(gpu_layers, "PRECISIONS", {name: gpu_layers.PRECISIONS[name] for name in ("tf32", "ieee")})
    from benchmarks import test_gpu

    monkeypatch.setattr(test_gpu, "ROUNDS", 3)
    monkeypatch.setattr(test_gpu, "LONGEST_LOOP", 0)  # to compile a loop takes longer than all else
