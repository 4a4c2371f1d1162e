"""Compiles kernels, and not in silence."""

import gc
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from numba import cfunc

from fastlstm.backends.numba.host.kernel_files import QUIET, folder

PATIENCE = 1.0  # seconds: loading a kernel from the cache takes less
turns = threading.RLock()  # numba has one of its own, but the garbage collector is the whole process's


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
    """Says on standard error why the caller waits, if a compilation takes longer than `PATIENCE`: a line once in a
    process, and on a terminal one with the kernels that are compiled now and those left, which is erased at the end.
    """

    def __init__(self, names: Iterable[str], at_once: int = 1) -> None:
        """`names`: the kernels' names, in the order in which they are begun, `at_once` of them at a time."""
        self.left, self.at_once, self.shown = list(names), at_once, False
        self.turns = threading.Lock()  # of the timer, and of whoever notes that a kernel is done

    def __enter__(self) -> "Progress":
        self._wait()
        return self

    def done(self, name: str) -> None:
        """Note that the kernel of this name is compiled."""
        self.timer.cancel()
        with self.turns:
            self.left.remove(name)
            if self.left and self.shown:
                self._show()
            elif self.left:
                self._wait()

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        with self.turns:
            self._rewrite("")

    def _wait(self) -> None:
        self.timer = threading.Timer(PATIENCE, self._begin)
        self.timer.daemon = True
        self.timer.start()

    def _begin(self) -> None:
        with self.turns:
            if self.left and not (self.shown or QUIET):
                self._announce()
                self.shown = True
                self._show()

    @staticmethod
    @cache
    def _announce() -> None:
        kept = f"later processes load them from {folder()}" if folder() else "no folder can be written to keep them in"
        print(f"fastlstm compiles its kernels for this processor, which takes seconds; {kept}", file=sys.stderr)

    def _show(self) -> None:
        plain = [name.partition(".")[0].rstrip("0123456789").replace("_", " ") for name in self.left]
        now, later = plain[: self.at_once], plain[self.at_once :]
        self._rewrite(f"compiling {', '.join(now)}" + f"; {len(later)} left: {', '.join(later)}" * bool(later))

    def _rewrite(self, line: str) -> None:
        if self.shown and sys.stderr is not None and sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]:{width}}\r", end="", file=sys.stderr, flush=True)
