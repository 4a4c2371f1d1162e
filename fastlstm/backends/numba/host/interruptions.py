"""What waits while numba or LLVM is at work: other threads, forks, and signals such as that of Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastlstm.forks import waited_for

turns = waited_for(threading.RLock())  # numba has one of its own, but the garbage collector is the whole process's


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let all of these wait for the end of the context: a handler of a signal that raises could leave numba in a state
    in which it never compiles again, and Python drops what is raised within a callback of LLVM.
    """
    handlers: dict[Any, Any] = {}
    frames: dict[Any, Any] = {}  # in which signals came
    with turns:
        try:
            try:
                for number in signal.valid_signals():
                    if callable(handler := signal.getsignal(number)):
                        signal.signal(number, handler)  # raises in every thread but the one where handlers run
                        handlers[number] = handler
                        signal.signal(number, frames.__setitem__)
            except ValueError:
                if handlers:
                    raise
            yield
        finally:
            _go_on(handlers, frames)


def _go_on(handlers: dict[Any, Any], frames: dict[Any, Any]) -> None:
    """Put all handlers back and call those whose signals came, even if one of them raises."""
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        while frames:
            number, frame = frames.popitem()
            handlers[number](number, frame)
    except BaseException:
        _go_on(handlers, frames)
        raise
