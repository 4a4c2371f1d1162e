"""What threads do while the process is forked: the fork waits for it where the child could not go on alone."""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from itertools import repeat
from operator import methodcaller
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")
_locks: list[Any] = []
_object_locks = WeakKeyDictionary[Any, None]()


class _Forking(threading.local):
    def __init__(self) -> None:
        self.acquired: list[Any] = []  # by this thread


_forking = _Forking()


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


# What the handler of a signal raises in a hook ends the hook, and os.fork goes on. It may be raised between any two
# instructions of Python, and while a lock is waited for. So one call of a function in C takes or releases a lock and
# changes the record.


def _acquire() -> None:
    if _forking.acquired:
        return
    try:
        object_locks = filter(None, [lock() for lock in _object_locks.keyrefs()])
        _forking.acquired.extend(filter(methodcaller("acquire"), [*object_locks, *_locks]))
    except BaseException:
        _release()
        _acquire()
        raise


def _release() -> None:
    acquired = _forking.acquired
    deque(map(methodcaller("release"), map(list.pop, repeat(acquired, len(acquired)))), 0)


if hasattr(os, "register_at_fork"):  # which Windows lacks
    for _ in range(2):  # if the first hook is cut off as it begins, the second does its work
        os.register_at_fork(before=_acquire, after_in_parent=_release, after_in_child=_release)


class cached_property(functools.cached_property[T]):
    """Python's, without the lock that it holds before Python 3.12, for which a forked child would wait for ever."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        super().__init__(function)
        self.lock = nullcontext()
