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
    """Return numba's C function of `function`, from the cache if it is there."""
    options: dict[str, Any] = {"nopython": True, "nogil": True, "error_model": "numpy", "boundscheck": False}
    with _telling(), _collecting_later():
        return cfunc(signature, cache=folder() is not None, **options)(function)


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
def _collecting_later() -> Iterator[None]:
    """A compilation makes so many objects that all of the process would be looked through again and again for garbage:
    a sixth of its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
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
