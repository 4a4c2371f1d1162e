"""Recurrent modules that run ours from their construction on, for code that builds its network where nobody sees it."""

import warnings
from collections.abc import Callable
from functools import cache, wraps
from threading import RLock, local
from typing import Any

from torch import nn

from fastlstm.backends import settings
from fastlstm.backends.settings import Backend
from fastlstm.convert import PAIRS, become, class_for
from fastlstm.forks import waited_for

_lock = waited_for(RLock())  # held while torch's classes change, so that threads see all of them patched or none
_active: list["patch"] = []  # the latest decides
_wrapped: dict[type, tuple[Callable[..., None], Callable[..., None]]] = {}  # each class's own constructor, and ours
_listeners: dict[type, Any] = {}  # what each class of torch's calls for a new subclass
_building = local()  # the ids of the modules that a thread constructs


class patch:
    """From this call on, every recurrent module of torch that is constructed runs fastlstm.

    It is for libraries that build their network inside a function of theirs, such as ``fit``, where `fastlstm.replace`
    comes too late. It does not matter how the library imported the class: ``from torch.nn import LSTM``, ``nn.LSTM``
    and subclasses are all seen. Each module becomes what `fastlstm.replace` with `keep_type` would make of it, at the
    end of its own constructor. So ``isinstance(module, nn.LSTM)`` stays true, by which libraries choose where weights
    start, and the same seed gives the same weights. Modules that exist already stay as they are, and so do new ones
    when the patch ends.

    As a context manager, ``with fastlstm.patch():``, it ends with the context. Otherwise it lasts until `unpatch`.
    Patches nest, and the latest one decides. They hold for all threads.

    `torch.compile` breaks its graph at each of these modules, as it does at torch's own, until
    ``fastlstm.replace(fastlstm.restore(model))``. A pickle of one names fastlstm, so that it needs fastlstm to be
    loaded. `fastlstm.restore` gives torch's back.

    A subclass that has an attribute which ours needs for itself stays torch's, with a UserWarning that names both. So
    does one that `fastlstm.replace` would leave as it is.

    Args:
        backend: for the new modules, as `fastlstm.LSTM`'s.

    Raises:
        ValueError: for an unknown backend; nothing is patched then.
    """

    def __init__(self, *, backend: Backend | None = None) -> None:
        if backend is not None:
            settings.check_name(backend)
        self.backend = backend
        self.__enter__()

    def __enter__(self) -> "patch":
        with _lock:
            if self not in _active:
                _active.append(self)
            for theirs, _ in PAIRS:
                _wrap(theirs)
                _listen(theirs)
        return self

    def __exit__(self, *exception: object) -> None:
        with _lock:
            if self in _active:  # `unpatch` may have ended it
                _active.remove(self)
            if _active:
                return
            for theirs, listener in _listeners.items():
                if vars(theirs).get("__init_subclass__") is listener:
                    del theirs.__init_subclass__
            _listeners.clear()
            for cls, (own, ours) in _wrapped.items():
                if vars(cls).get("__init__") is ours:  # and no other library has wrapped it since
                    cls.__init__ = own  # type: ignore[misc]
            _wrapped.clear()


def unpatch() -> None:
    """End every `patch` of the process. Modules that were constructed meanwhile stay fastlstm's."""
    with _lock:
        for each in _active[:]:
            each.__exit__()


def _wrap(cls: Any) -> None:
    """Wrap the constructors of a class of torch's and of its subclasses."""
    if "__init__" in vars(cls) and cls not in _wrapped:
        own = cls.__init__
        cls.__init__ = _converting(own)
        _wrapped[cls] = own, cls.__init__
    for each in type.__subclasses__(cls):
        _wrap(each)


def _listen(theirs: Any) -> None:
    """Wrap the constructors of subclasses that are defined while the patch lasts."""

    def init_subclass(cls: type, **options: Any) -> None:
        super(theirs, cls).__init_subclass__(**options)
        with _lock:
            if _active:
                _wrap(cls)

    if theirs not in _listeners:
        theirs.__init_subclass__ = _listeners[theirs] = classmethod(init_subclass)


def _converting(constructor: Callable[..., None]) -> Callable[..., None]:
    @wraps(constructor)
    def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        building = vars(_building).setdefault("ids", set())
        latest = next(reversed(_active), None)  # a patch may have ended in another thread
        if latest is None or id(self) in building:  # a subclass calls the constructor that it inherits
            constructor(self, *args, **kwargs)
            return
        building.add(id(self))
        try:
            constructor(self, *args, **kwargs)
        finally:
            building.discard(id(self))
        try:
            cls = class_for("patch", self, keep_type=True)
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
