"""Stands in for a CUDA device, so that the GPU benchmark's own lines run where there is none.

As a plugin, `pytest -p tests.helpers.stand_in benchmarks/ -k gpu` under TRITON_INTERPRET=1 runs the GPU's rows on a
tiny layer on the CPU. What torch.cuda has no name for cannot be replaced, so misspelt names still fail.
"""

import contextlib
import time

import pytest
import torch

from benchmarks.gpu import layers
from benchmarks.shared.contest import PRECISIONS
from benchmarks.shared.shapes import Shape

TINY = Shape(3, 2, 4, 8)


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


def install(monkeypatch):
    for name, value in {
        "Event": Event, "Stream": Stream, "CUDAGraph": CUDAGraph, "current_stream": Stream,
        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext, "synchronize": lambda: None,
        "is_available": lambda: True, "get_device_name": lambda: "A card",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(layers, "DEVICE", "cpu")
    monkeypatch.setattr(layers, "FLUSH", 1)


def pytest_configure(config):
    monkeypatch = pytest.MonkeyPatch()
    config.add_cleanup(monkeypatch.undo)
    install(monkeypatch)
    monkeypatch.setattr(layers, "SHAPES", (TINY,))
    monkeypatch.setitem(PRECISIONS, "bf16", PRECISIONS["ieee"])  # the interpreter multiplies bf16 as integers
