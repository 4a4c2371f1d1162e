"""Which functions of the backends are called."""

import weakref

from fastlstm import dispatch

CPU = ("native", "numba", *dispatch.NUMBA_PRECISIONS)  # the names with a precision have functions of their own


class Calls:
    """The calls of backends' functions, by name, and weak references to the weights that they have packed."""

    def __init__(self, monkeypatch, *backends):
        self.names, self.packed = [], []
        for backend in map(dispatch.module, backends):
            for name in ("forward", "backward", "pack"):
                if hasattr(backend, name):
                    monkeypatch.setattr(backend, name, self._counted(name, getattr(backend, name)))

    def _counted(self, name, function):
        def call(*args, **options):
            self.names.append(name)
            result = function(*args, **options)
            if name == "pack":
                self.packed.append(weakref.ref(result))
            return result

        return call

    def count(self, name):
        return self.names.count(name)
