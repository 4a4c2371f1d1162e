"""What the tests of kept weights share."""

import weakref

import pytest

import fastlstm
from fastlstm import dispatch
from fastlstm.backends import native, numba
from tests.helpers.layers import CPU_BACKENDS


class Calls:
    """The calls of the CPU backends' functions, by name, and weak references to the weights that they have packed."""

    def __init__(self, monkeypatch):
        self.names, self.packed = [], []
        # the names with a precision have functions of their own
        for backend in (native, numba, *(dispatch.module(f"numba-{precision}") for precision in numba.PIECES)):
            for name in ("forward", "backward", "pack"):
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


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


@pytest.fixture(params=CPU_BACKENDS, scope="module")
def cpu_backend(request):
    """The default of a module of tests, each CPU backend in turn."""
    with fastlstm.use_backend(request.param):
        yield request.param
