"""Compiles kernels, and not in silence."""

import gc
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from numba import cfunc
from numba.core.compiler_lock import global_compiler_lock

from fastlstm.backends.numba.host.interruptions import turns
from fastlstm.backends.numba.host.kernel_files import folder, say
from fastlstm.forks import waited_for

waited_for(global_compiler_lock._lock)  # held by a user's own compilation, it would stop those of a forked child
LONG = "primitives", "matrix", "forward", "backward"  # kernels that take seconds; all others take about one or less


def compiled(signature: Any, function: Callable[..., None]) -> Any:
    """Return numba's C function, in turns, and without the garbage collector, which would take a sixth of the time."""
    with turns:
        is_enabled = gc.isenabled()
        gc.disable()
        try:
            return cfunc(signature)(function)
        finally:
            if is_enabled:
                gc.enable()


class Progress:
    """Says on standard error why the caller waits for seconds: a line once in a process, and on a terminal one with the
    kernels that are compiled now and those left, which is erased at the end.
    """

    def __init__(self, names: Iterable[str], at_once: int = 1) -> None:
        """`names`: the kernels' names, in the order in which they are begun, `at_once` of them at a time."""
        self.left, self.at_once = list(names), at_once
        self.is_long = any(name.startswith(LONG) for name in self.left)

    def __enter__(self) -> "Progress":
        if self.is_long:
            self._announce()
            self._show()
        return self

    def done(self, name: str) -> None:
        """Note that the kernel of this name is compiled."""
        self.left.remove(name)
        if self.left:
            self._show()

    def __exit__(self, *error: object) -> None:
        self.left.clear()
        self._show()

    @staticmethod
    @cache
    def _announce() -> None:
        kept = f"later processes load them from {folder()}" if folder() else "no folder can be written to keep them in"
        say(f"fastlstm compiles its kernels for this processor, which takes seconds; {kept}")

    def _show(self) -> None:
        plain = [name.partition(".")[0].rstrip("0123456789").replace("_", " ") for name in self.left]
        now, later = plain[: self.at_once], plain[self.at_once :]
        line = f"compiling {', '.join(now)}" * bool(now) + f"; {len(later)} left: {', '.join(later)}" * bool(later)
        width = shutil.get_terminal_size().columns - 1
        with suppress(AttributeError, ValueError):  # of a stream that is missing or closed
            if self.is_long and sys.stderr.isatty():
                say(f"\r{line[:width]:{width}}\r", end="")
