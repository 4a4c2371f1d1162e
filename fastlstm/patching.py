"""Recurrent modules that become ours as they are constructed, for code that builds its network where nobody sees it."""

import warnings
from collections.abc import Callable
from functools import cache, wraps
from threading import RLock
from typing import Any

from torch import nn

from fastlstm.backends import settings
from fastlstm.backends.settings import Backend
from fastlstm.convert import PAIRS, become, class_for

_lock = RLock()  # held while the classes of torch change, so that threads see all of them patched or none
_active: list["patch"] = []  # the latest decides
_constructors: dict[type, Callable[..., None]] = {}  # torch's own, while they are wrapped


class patch:
    """From this call on, every recurrent module of torch that is constructed is fastlstm's.

    It is for libraries that build their network inside a function of theirs, such as ``fit``, where `fastlstm.replace`
    comes too late. It does not matter how the library imported the class: ``from torch.nn import LSTM``, ``nn.LSTM``
    and subclasses are all seen. Each module becomes what `fastlstm.replace` would make of it, at the end of the
    constructor of torch's class. Modules that exist already stay as they are, and so do new ones when the patch ends.

    As a context manager, ``with fastlstm.patch():``, it ends with the context. Otherwise it lasts until `unpatch`.
    Patches nest, and the latest one decides. They hold for all threads.

    A pickle of such a module names fastlstm's class, so that it needs fastlstm to be loaded. `fastlstm.restore` gives
    torch's back. ``isinstance(module, nn.LSTM)`` is false without `keep_type`, as after `replace`.

    A subclass that has an attribute which ours needs for itself stays torch's, with a UserWarning that names both.

    Args:
        backend: for the new modules, as `fastlstm.LSTM`'s.
        keep_type: the modules remain instances of torch's classes, for a library that asks. `torch.compile` then breaks
            its graph at each of them, as it does at torch's own.

    Raises:
        ValueError: for an unknown backend; nothing is patched then.
    """

    def __init__(self, *, backend: Backend | None = None, keep_type: bool = False) -> None:
        if backend is not None:
            settings.check_name(backend)
        self.backend, self.keep_type = backend, keep_type
        self.__enter__()

    def __enter__(self) -> "patch":
        with _lock:
            if self not in _active:
                _active.append(self)
            for theirs, _ in PAIRS:
                if theirs not in _constructors:
                    _constructors[theirs] = theirs.__init__
                    theirs.__init__ = _wrapped(theirs.__init__)
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            if self in _active:
                _active.remove(self)
            if not _active:
                for theirs, constructor in _constructors.items():
                    theirs.__init__ = constructor  # type: ignore[misc]
                _constructors.clear()


def unpatch() -> None:
    """End every `patch` of the process. Modules that were constructed meanwhile stay fastlstm's."""
    with _lock:
        for each in _active[:]:
            each.__exit__()


def _wrapped(constructor: Callable[..., None]) -> Callable[..., None]:
    @wraps(constructor)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        if (latest := next(reversed(_active), None)) is None:  # a patch may have ended in another thread
            return
        try:
            cls = class_for("patch", self, latest.keep_type)
        except TypeError as error:
            _warn(str(error))
            return
        if cls is not None:
            become(self, cls)
            if latest.backend is not None:
                vars(self)["backend"] = latest.backend

    return construct


@cache  # once for each class, whatever the warning filters say
def _warn(message: str) -> None:
    warnings.warn(f"{message}; it stays torch's", stacklevel=3)
