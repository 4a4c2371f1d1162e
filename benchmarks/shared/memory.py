"""Peak memory of a call: how far the process' resident memory rises while it runs, in a process of its own.

Resident memory sees every allocator, torch's, NumPy's and a library's own scratch space alike, where a profiler of
torch's allocator sees only the first. Linux resets its high-water mark on request; elsewhere nothing is measured.
Calls with two time steps, of these rows and of many, go first: then no code that is compiled or loaded counts, and all
buffers do, since those that fastlstm keeps for later calls are given back before the measured ones.
"""

import ctypes
import gc
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from benchmarks.shared.contest import Contest
from benchmarks.shared.shapes import MODES, Shape
from fastlstm.backends import pool

PROC = Path("/proc/self")
# Every larger block is mapped by itself and unmapped when freed: nothing is kept from one call to the next.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    """Bytes: "VmRSS" is now, "VmHWM" the highest since the last reset."""
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", lambda kept: None)(0)  # glibc only
    (PROC / "clear_refs").write_text("5")


def peaks(shape: Shape, implementation: str, threads: int, dtype: str) -> dict[str, int]:
    """Bytes by mode, in this process."""
    torch.set_num_threads(threads)
    for rows in (shape.B, max(shape.B, 128)):  # many rows may take other kernels
        warm_up = Contest(replace(shape, T=min(shape.T, 2), B=rows), dtype)
        for mode in MODES:
            warm_up.run(implementation, mode)()
        del warm_up
    result = {}
    for mode in MODES:
        contest = Contest(shape, dtype)  # a layer that has packed no weights
        run = contest.run(implementation, mode)
        pool.forget()
        reset_peak()
        before = resident("VmRSS")
        for _ in range(3):
            run()
        result[mode] = max(0, resident("VmHWM") - before)
        del contest, run
    return result


def peak_memory(shape: Shape, implementation: str, threads: int, dtype: str = "float32") -> dict[str, int] | None:
    """Bytes by mode, for a module of Contest's, in a fresh process; None where it cannot be measured."""
    if not os.access(PROC / "clear_refs", os.W_OK):
        return None
    with mock.patch.dict(os.environ, MALLOC), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peaks, shape, implementation, threads, dtype).result()
