"""Calls of other runtimes. A process of its own builds them, compares their results, and times blocks of calls."""

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import NamedTuple

from benchmarks.runtimes.cases import TOLERANCE, Contender, LayerCase, Unsupported

BLOCK, FEWEST = 0.03, 3  # seconds of a block, and its calls at least
SETTLE = 0.08  # seconds after a block: idle threads of ONNX Runtime spin on for 70 ms
INT8_TOLERANCE = 5e-2  # of outputs, whose weights and inputs are rounded to 255 values
SPAWN = multiprocessing.get_context("spawn")


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


def serve(connection: Connection, name: str) -> None:
    """Answer requests until None comes: a list of (case, threads) is built, in the place of the last list, and answered
    by whether each is supported. A number runs a block of calls, and is answered by a call's median seconds.

    Raises:
        AssertionError: for a wrong result.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    build, contenders = builder(name), {}
    while (request := connection.recv()) is not None:
        if isinstance(request, int):
            connection.send(block(contenders[request]))
            continue
        contenders = {}
        for case, threads in request:
            try:
                contenders[threads] = build(case, threads)
            except Unsupported:
                continue
            case.compare(name, contenders[threads].results(), RUNTIMES[name].tolerance)
        connection.send(list(contenders))


def block(contender: Contender) -> float:
    """Return the median seconds of the calls of a block, after an untimed one."""
    call, clock, times = contender.call, time.perf_counter, []
    call()
    end = clock() + BLOCK
    while len(times) < FEWEST or clock() < end:
        begin = clock()
        call()
        times.append(clock() - begin)
    return statistics.median(times)


@functools.cache
def process(name: str) -> Connection:
    """Start the process of a runtime, which ends with this one."""
    ours, theirs = SPAWN.Pipe()
    SPAWN.Process(target=serve, args=(theirs, name), daemon=True).start()
    theirs.close()
    return ours


class Elsewhere:
    """A call in the process of a runtime, for the clock."""

    def __init__(self, end: Connection, threads: int) -> None:
        self.end, self.threads = end, threads

    def __call__(self) -> None:
        self.sample()

    def sample(self) -> float:
        self.end.send(self.threads)
        seconds: float = self.end.recv()
        time.sleep(SETTLE)
        return seconds


def elsewhere(case: LayerCase, names: Sequence[str], counts: Sequence[int]) -> dict[str, dict[int, Elsewhere]]:
    """Return the calls of a case by the installed ones of these runtimes, for each thread count, results compared.

    Raises:
        RuntimeError: where a runtime fails.
    """
    calls = {}
    for name in (name for name in installed() if name in names):
        end, of_runtime = process(name), counts if RUNTIMES[name].takes_threads else counts[-1:]
        end.send([(case, threads) for threads in of_runtime])
        try:
            supported = end.recv()
        except EOFError as error:
            raise RuntimeError(f"{name} failed at {case.shape}: its process has printed why") from error
        if supported:
            calls[name] = {threads: Elsewhere(end, threads) for threads in supported}
    return calls
