"""Which functions of the backends are called, those of their plans included, and which weights stay packed."""

import weakref

from torch import Tensor

from fastlstm.backends import dispatch

CPU = ("native", "numba", *dispatch.NUMBA_PRECISIONS)  # the names with a precision have functions of their own


class Calls:
    """The calls of backends' functions, by name, and weak references to the weights that they have packed and kept.

    A plan's ``forward`` and ``backward`` count as the backend's own do. What a backend calls of its own functions
    does not count. Weights that are packed for one call alone are not seen.
    """

    def __init__(self, monkeypatch, *backends):
        self.names, self.packed, self.inside = [], [], False
        for backend in map(dispatch.module, backends):
            for name in ("forward", "backward"):
                monkeypatch.setattr(backend, name, self._counted(name, getattr(backend, name)))
            if backend.TRAITS.plans:
                monkeypatch.setattr(backend, "plan", self._counting_plans(backend.plan))

    def _counted(self, name, function, kept=None):
        def call(*args, **options):
            if self.inside:
                return function(*args, **options)
            self.names.append(name)
            self.inside = True
            try:
                return function(*args, **options)
            finally:
                self.inside = False
                self.packed += (weakref.ref(a) for a in tensors_in(kept) if all(a is not ref() for ref in self.packed))

        return call

    def _counting_plans(self, function):
        counted = self._counted("plan", function)

        def plan(layer, save, kept, ends, **options):
            made = counted(layer, save, kept, ends, **options)
            if not self.inside:
                made.forward, made.backward = (
                    self._counted(name, getattr(made, name), kept) for name in ("forward", "backward")
                )
            return made

        return plan

    def count(self, name):
        """How often a function was called; of "pack", how often weights were packed to be kept."""
        return len(self.packed) if name == "pack" else self.names.count(name)


def tensors_in(kept):
    """The tensors in what a layer's plans share, however a backend has put them there."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, dict | list | tuple):
        for each in kept.values() if isinstance(kept, dict) else kept:
            yield from tensors_in(each)
    elif hasattr(kept, "__dict__"):
        yield from tensors_in(vars(kept))
