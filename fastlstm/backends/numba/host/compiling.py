"""How kernels are compiled: once, kept in numba's cache where a folder for it can be written, and not in silence."""

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from numba import cfunc, njit

QUIET = os.environ.get("FASTLSTM_QUIET", "0") not in ("", "0")
PATIENCE = 1.0  # seconds: loading a kernel from the cache takes less
_told = QUIET
_turns = threading.RLock()  # numba has one of its own, but the garbage collector is the whole process's


@cache
def folder() -> str | None:
    """Return the folder in which numba keeps the kernels, or None if no folder for them can be written.

    numba then reads none either, so that a filled folder is of no use without the right to write to it.
    """

    def beside_the_kernels() -> None:  # numba chooses the folder by the file that a function stands in
        pass

    try:
        return str(njit(cache=True)(beside_the_kernels).stats.cache_path)
    except RuntimeError:
        return None


def compiled(signature: Any, function: Callable[..., None]) -> Any:
    """Return numba's C function of `function`, from the cache if it is there. Threads take turns."""
    with _telling(), _turns, _without_collection():
        return cfunc(signature, cache=folder() is not None)(function)


@contextmanager
def _telling() -> Iterator[None]:
    """Say on standard error, once in a process, why the caller waits."""
    timer = threading.Timer(PATIENCE, _tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector away: it would look through all objects of the process again and again, as a
    compilation makes so many, and take a sixth of the time.
    """
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


def _tell() -> None:
    global _told
    if not _told:
        _told = True
        kept = f"later processes load them from {folder()}" if folder() else "no folder can be written to keep them in"
        print(f"fastlstm compiles its kernels for this processor, which takes seconds; {kept}", file=sys.stderr)
