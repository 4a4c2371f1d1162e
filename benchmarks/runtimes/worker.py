"""The process of one contender: it builds its calls of all cases, compares their results, and times blocks of calls."""

import os
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import NamedTuple

from benchmarks.runtimes.cases import TOLERANCE, Case, Contender, Unsupported

FEWEST = 3  # calls of a block


class Runtime(NamedTuple):
    """A contender by the name that tables give it."""

    function: str  # module:name, of what returns a `Contender`
    packages: tuple[str, ...]  # that it imports; without one of them it does not take part
    distributions: tuple[str, ...]  # whose versions a report names
    takes_threads: bool = True  # whether it runs on the number of threads that it is given


RUNTIMES = {
    "fastlstm": Runtime("with_torch:fastlstm_layer", ("fastlstm",), ("fastlstm", "numba")),
    "fastlstm's stream": Runtime("with_torch:fastlstm_stream", ("fastlstm",), ()),
    "torch.nn": Runtime("with_torch:nn_layer", ("torch",), ("torch",)),
    "ONNX Runtime": Runtime("with_onnx:onnxruntime_layer", ("onnx", "onnxruntime"), ("onnxruntime",)),
    "OpenVINO": Runtime("with_onnx:openvino_layer", ("onnx", "openvino"), ("openvino",)),
    "ncnn": Runtime("with_ncnn:ncnn_layer", ("ncnn",), ("ncnn",)),
    "LiteRT": Runtime("with_keras:litert_layer", ("ai_edge_litert", "tensorflow"), ("ai-edge-litert",)),
    "JAX": Runtime("with_jax:jax_layer", ("jax",), ("jax",), takes_threads=False),
    "Keras": Runtime("with_keras:keras_layer", ("keras", "tensorflow"), ("keras", "tensorflow"), takes_threads=False),
}


def installed() -> list[str]:
    return [name for name, runtime in RUNTIMES.items() if all(find_spec(package) for package in runtime.packages)]


def builder(name: str) -> Callable[[Case, int], Contender]:
    module, _, function = RUNTIMES[name].function.partition(":")
    return getattr(import_module(f"benchmarks.runtimes.{module}"), function)


def serve(connection: Connection, name: str, cases: list[Case], counts: list[int]) -> None:
    """Send {(case, threads): largest error} of what the contender can run, then the seconds of the calls of each block
    that is asked for: (case, threads, seconds). None ends the process.

    Raises:
        AssertionError: for a wrong result.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    build, contenders, errors = builder(name), {}, {}
    for k, case in enumerate(cases):
        for threads in counts if RUNTIMES[name].takes_threads else counts[-1:]:
            try:
                contender = build(case, threads)
            except Unsupported:
                continue
            errors[k, threads] = case.error(contender.results())
            if not errors[k, threads] <= TOLERANCE:  # NaN is an error too
                raise AssertionError(f"{name}: {case.mode} of {case.shape} errs by {errors[k, threads]:.1e}")
            contender.call()
            contenders[k, threads] = contender
    connection.send(errors)
    while (request := connection.recv()) is not None:
        k, threads, seconds = request
        connection.send(block(contenders[k, threads], seconds))


def block(contender: Contender, seconds: float) -> list[float]:
    """Return the seconds of each call of a block, which takes `seconds` or `FEWEST` calls after an untimed one."""
    call, clock, times = contender.call, time.perf_counter, []
    contender.begin()
    call()
    end = clock() + seconds
    while len(times) < FEWEST or clock() < end:
        begin = clock()
        call()
        times.append(clock() - begin)
    return times
