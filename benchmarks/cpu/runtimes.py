"""Layers beside every other runtime: sequences, single steps, training, int8 weights, and a classifier in C."""

import ctypes
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

import fastlstm
from benchmarks.runtimes.cases import TOLERANCE, make
from benchmarks.runtimes.with_onnx import onnx_model, onnxruntime_session
from benchmarks.runtimes.with_torch import modules, quantized
from benchmarks.runtimes.worker import INT8_TOLERANCE, RUNTIMES, elsewhere
from benchmarks.shared.case import OURS, Case, Runs, Skip
from benchmarks.shared.clock import num_threads, thread_counts
from benchmarks.shared.shapes import Shape
from fastlstm.backends import csrc
from fastlstm.export import model_bytes
from fastlstm.mnist.model import RowLSTM

LAYERS = {
    "inference": (
        Shape(20, 1, 8, 16),
        Shape(3, 3, 46, 78, bidirectional=True),
        Shape(100, 1, 40, 128),
        Shape(50, 16, 64, 64),
        Shape(28, 128, 28, 128),
        Shape(50, 32, 80, 256, layers=2, bidirectional=True),
    ),
    "step": (Shape(1, 1, 1, 20), Shape(1, 1, 40, 128), Shape(1, 1, 128, 512)),
    "training": (Shape(50, 1, 40, 128), Shape(28, 128, 28, 128)),
}
STREAMS = ((40, 128), (128, 128), (512, 512), (1024, 1024))  # I, H
BATCHES = {(128, 128): (1, 8)}  # of streams, other than one row
INT8 = ((1, 128, 128), (1, 512, 512), (1, 1024, 1024), (16, 256, 256), (64, 256, 256), (128, 28, 128))  # B, I, H
WORK, MOST_STEPS = 1e9, 1000  # multiply-adds of a call, which say how many steps it has
IMAGES = 2048
FLOAT32 = tuple(name for name in RUNTIMES if "int8" not in name)


def here(shape: Shape, threads: int | None, has_ways: bool, mode: str) -> Runs:
    """Return what runs a layer or a step in this process: modules of torch, results compared.

    Args:
        threads: the thread count; one and all without it.
        has_ways: whether our other ways run too, as those with int8 weights.
    """
    case, runs = make(mode, shape), Runs()
    for n in thread_counts(threads):
        with num_threads(n):
            for prepare, tolerance in ((modules, TOLERANCE), *([(quantized, INT8_TOLERANCE)] * has_ways)):
                for name, contender in prepare(case).items():
                    if not (has_ways or name in (OURS, "torch")):
                        continue
                    case.compare(name, contender.results(), tolerance)
                    runs.setdefault(name, {})[n] = contender.call  # type: ignore[index]
    return runs


def there(shape: Shape, names: Sequence[str], threads: int | None, mode: str) -> Runs:
    return {**elsewhere(make(mode, shape), names, thread_counts(threads))}


def int8_shape(B: int, I: int, H: int) -> Shape:
    return Shape(max(4, min(MOST_STEPS, round(WORK / (B * 4 * H * (I + H))))), B, I, H)


def int8_runs(shape: Shape, mode: str) -> Runs:
    """Return a layer with int8 weights as ours."""
    if not csrc.LIBRARY.exists():
        raise Skip("the compiled library is not installed")
    runs = here(shape, 1, True, mode)
    float32, int8 = runs.pop(OURS), runs.pop("int8")
    return {OURS: int8, "float32": float32, **runs}


def c_classifier(model: RowLSTM, images: torch.Tensor, B: int, threads: int) -> Any:
    """Return a call of fastlstm_model_run of csrc/fastlstm.h, on the library's own threads."""
    library, content, loaded = ctypes.CDLL(str(csrc.LIBRARY)), model_bytes(model.state_dict()), ctypes.c_void_p()
    library.fastlstm_model_read(content, ctypes.c_size_t(len(content)), ctypes.byref(loaded))
    call = library.fastlstm_model_run
    call.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 2, ctypes.c_char_p]
    team, (count, T, I), C = csrc.THREADS.pack(threads, 0, 0), images.shape, model.linear.out_features
    logits = np.full((count, C), np.nan, np.float32)

    def run() -> np.ndarray:
        for k in range(0, count, B):
            call(loaded, B, T, images.data_ptr() + 4 * k * T * I, logits.ctypes.data + 4 * k * C, team)
        return logits

    return run


def onnx_classifier(model: RowLSTM, images: torch.Tensor, B: int, threads: int) -> Any:
    """Return a call of the model in ONNX Runtime."""
    session = onnxruntime_session(onnx_model(fastlstm.restore(deepcopy(model)), x=images[:B]), threads)
    feeds = [{"x": batch.numpy()} for batch in images.split(B)]
    return lambda: np.concatenate([session.run(None, feed)[0] for feed in feeds])


def classifier(B: int, mode: str) -> Runs:
    """Return the row classifier of csrc/ and the same in ONNX Runtime, for images that lie ready."""
    if not csrc.LIBRARY.exists():
        raise Skip("the compiled library is not installed")
    model, images = RowLSTM().eval(), torch.randint(256, (IMAGES, 28, 28)) / 255  # T 28, I 28, H 128
    ways = {OURS: c_classifier, "ONNX Runtime": onnx_classifier}
    return {name: {n: prepare(model, images, B, n) for n in thread_counts()} for name, prepare in ways.items()}


def layer(group: str, shape: Shape, mode: str, names: Sequence[str], threads: int | None = None) -> Case:
    build = partial(here, shape, threads, group == "streams")
    others = partial(there, shape, names, threads)
    return Case(group, str(shape), build, (mode,), threads=threads, tolerance=None, others=others)


def int8_case(shape: Shape) -> Case:
    build, others = partial(int8_runs, shape), partial(there, shape, ("ONNX Runtime int8",), 1)
    options = {"threads": 1, "tolerance": None, "steps": shape.T, "is_brief": shape.H == 512}
    return Case("int8", str(shape), build, ("inference",), others=others, **options)


CASES = [
    *(
        layer("runtimes", replace(shape, cell=cell), mode, FLOAT32)
        for cell in ("LSTM", "GRU")
        for mode, shapes in LAYERS.items()
        for shape in shapes
    ),
    *(
        Case("runtimes", f"MNIST in C, B {B}", partial(classifier, B), ("inference",), ("onnxruntime",), steps=IMAGES)
        for B in (1, 128)
    ),
    *(
        layer("streams", Shape(1, B, *sizes), "step", ("ONNX Runtime", "ONNX Runtime int8"), threads=1)
        for sizes in STREAMS
        for B in BATCHES.get(sizes, (1,))
    ),
    *(layer("streams", Shape(1, 1, *sizes, cell="GRU"), "step", ("ONNX Runtime",), threads=1) for sizes in STREAMS[:3]),
    *(int8_case(int8_shape(*sizes)) for sizes in INT8),
]
