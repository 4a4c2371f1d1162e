"""Calls of other runtimes. A process of its own builds them, compares their results, and times blocks of calls."""

import functools
import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from benchmarks.runtimes.cases import TOLERANCE, Contender, LayerCase, Unsupported

BLOCK, FEWEST = 0.03, 3  # seconds of a block, and its calls at least
SETTLE = 0.08  # seconds after a block: idle threads of ONNX Runtime spin on for 70 ms
INT8_TOLERANCE = 5e-2  # of outputs, whose weights and inputs are rounded to 255 values
CONTENDERS: dict[int, Contender] = {}  # of the case that the process of a runtime has built last, by thread counts


class Runtime(NamedTuple):
    """A runtime by the name that tables give it."""

    function: str  # module:name, of what returns a `Contender`
    packages: tuple[str, ...]  # that it imports; without one of them it does not take part
    takes_threads: bool = True  # whether it runs on the number of threads that it is given
    tolerance: float = TOLERANCE


RUNTIMES = {
    "ONNX Runtime": Runtime("with_onnx:onnxruntime_layer", ("onnx", "onnxruntime")),
    "ONNX Runtime int8": Runtime("with_onnx:onnxruntime_int8_layer", ("onnx", "onnxruntime"), tolerance=INT8_TOLERANCE),
    "OpenVINO": Runtime("with_onnx:openvino_layer", ("onnx", "openvino")),
    "ncnn": Runtime("with_ncnn:ncnn_layer", ("ncnn",)),
    "LiteRT": Runtime("with_keras:litert_layer", ("ai_edge_litert", "tensorflow")),
    "JAX": Runtime("with_jax:jax_layer", ("jax",), takes_threads=False),
    "Keras": Runtime("with_keras:keras_layer", ("keras", "tensorflow"), takes_threads=False),
}


def installed() -> list[str]:
    return [name for name, runtime in RUNTIMES.items() if all(find_spec(package) for package in runtime.packages)]


def builder(name: str) -> Callable[[LayerCase, int], Contender]:
    module, _, function = RUNTIMES[name].function.partition(":")
    return getattr(import_module(f"benchmarks.runtimes.{module}"), function)


def prepare() -> None:
    """Prepare the process of a runtime. It ends when its parent does, and leaves Ctrl-C to it."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@functools.cache
def process(name: str) -> ProcessPoolExecutor:
    """Return the process of a runtime."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare)


def build(name: str, case: LayerCase, counts: Sequence[int]) -> list[int]:
    """Build a case in this process, in the place of the last one, and return the thread counts on which it runs.

    Raises:
        AssertionError: for a wrong result.
    """
    CONTENDERS.clear()
    for threads in counts:
        with suppress(Unsupported):
            CONTENDERS[threads] = builder(name)(case, threads)
            case.compare(name, CONTENDERS[threads].results(), RUNTIMES[name].tolerance)
    return list(CONTENDERS)


def block(threads: int) -> float:
    """Return the median seconds of the calls of a block in this process, after an untimed one."""
    call, clock, times = CONTENDERS[threads].call, time.perf_counter, []
    call()
    end = clock() + BLOCK
    while len(times) < FEWEST or clock() < end:
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times)


@dataclass(frozen=True)
class Elsewhere:
    """A call in the process of a runtime. It returns a sample of its seconds, for the clock."""

    name: str
    threads: int

    def __call__(self) -> float:
        seconds = process(self.name).submit(block, self.threads).result()
        time.sleep(SETTLE)
        return seconds

    sample = __call__


def elsewhere(case: LayerCase, names: Sequence[str], counts: Sequence[int]) -> dict[str, dict[int, Elsewhere]]:
    """Return the calls of a case by the installed ones of these runtimes, for each thread count, results compared.

    Raises:
        AssertionError: for a wrong result.
    """
    calls = {}
    for name in (name for name in installed() if name in names):
        of_runtime = counts if RUNTIMES[name].takes_threads else counts[-1:]
        if supported := process(name).submit(build, name, case, of_runtime).result():
            calls[name] = {threads: Elsewhere(name, threads) for threads in supported}
    return calls
