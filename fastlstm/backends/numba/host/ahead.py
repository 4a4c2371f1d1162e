"""Compiles kernels ahead of their first use, in several processes: in one process LLVM compiles one at a time."""

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from types import SimpleNamespace
from typing import Any

import torch

from fastlstm.backends.numba.host import tasks
from fastlstm.backends.numba.host.compiling import Progress
from fastlstm.backends.numba.llvm.loops import tables

Run = Callable[[], object]
_functions_in_use: list[dict[str, Any]] = []  # of earlier tables: what the process keeps still leads to their code
_nothing = ctypes.CFUNCTYPE(None)(lambda: None)


class _Idle(dict[str, Any]):
    """Gives a function that does nothing for every name. Asking adds it, so the keys are all kernels asked for."""

    def __contains__(self, name: Any) -> bool:
        return self[name] is not None

    def __missing__(self, name: str) -> Any:
        self[name] = SimpleNamespace(address=ctypes.cast(_nothing, ctypes.c_void_p).value)
        return self[name]


def compile_ahead(runs: Sequence[Run], workers: int) -> None:
    """Compile all kernels that calls need, into their files.

    Args:
        runs: functions that make the calls and can be pickled. Other processes run them with kernels that do nothing.
        workers: the number of processes.

    Raises what the compilation of a kernel raises.
    """
    # Forked processes need not import torch. They would lack threads of OpenMP, of which this one has started none.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, _begin) as pool:
        try:
            run_of = {name: run for run, names in zip(runs, pool.map(_names, runs)) for name in names}
            futures = {pool.submit(_compile, name, run_of[name]): name for name in tasks.load(run_of)}
            with Progress(futures.values(), workers) as progress:
                for future in as_completed(futures):
                    future.result()
                    progress.done(futures[future])
        except BaseException:  # Ctrl-C among them
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _begin() -> None:
    # Ctrl-C reaches the main process too, which ends this one. If it ended by itself, the main process might take that
    # for an error before its own signal comes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _names(run: Run) -> list[str]:
    _functions_in_use.append(tasks.compiled_functions)
    tasks.compiled_functions = idle = _Idle()
    run()
    return list(idle)


def _compile(name: str, run: Run) -> None:
    if name not in tasks.KERNELS and name not in tables:
        _names(run)  # adds to `tables` the generated functions of its cell
    tasks.compile_and_store(name)
