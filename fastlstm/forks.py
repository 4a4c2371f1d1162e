"""What threads do while the process is forked: the fork waits for it where the child could not go on alone."""

import functools
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
_locks: list[Any] = []
_object_locks = WeakKeyDictionary[Any, None]()
_forking = threading.local()


def waited_for(lock: Any) -> Any:
    """Return a module's reentrant lock, for which every fork waits from now on. The child finds it free, and whole what
    it guards. A thread that holds it may take those that were given to this function later, and no earlier ones.
    """
    _locks.append(lock)
    return lock


def object_lock() -> Any:
    """Return such a lock for an object that may be freed. A thread that holds it may take all locks of modules."""
    _object_locks[lock := threading.RLock()] = None
    return lock


def _acquire() -> None:
    _forking.acquired = []
    object_locks = filter(None, [lock() for lock in _object_locks.keyrefs()])
    for lock in [*object_locks, *_locks]:
        lock.acquire()
        _forking.acquired.append(lock)


def _release() -> None:
    while _forking.acquired:
        _forking.acquired.pop().release()


if hasattr(os, "register_at_fork"):  # which Windows lacks
    os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)


class cached_property(functools.cached_property[T]):
    """Python's, without the lock that it holds before Python 3.12, for which a forked child would wait for ever."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        super().__init__(function)
        self.lock = nullcontext()
