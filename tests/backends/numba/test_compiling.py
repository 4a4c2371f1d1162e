"""How kernels are compiled: without the garbage collector, which belongs to the whole process."""

import gc
import time

import pytest

from fastlstm.backends.numba.host import compiling
from tests.helpers.threads import at_once


@pytest.fixture
def compiled(monkeypatch):
    """Calls what compiles a kernel, with a function in place of numba's compiler."""

    def call(compiler):
        monkeypatch.setattr(compiling, "cfunc", lambda signature: lambda function: compiler())
        return compiling.compiled(None, None)

    before = gc.isenabled()
    yield call
    (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_it_was(compiled, enabled):
    (gc.enable if enabled else gc.disable)()
    assert compiled(gc.isenabled) is False
    assert gc.isenabled() == enabled


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_after_an_error(compiled, error):
    def fail():
        raise error

    gc.enable()
    with pytest.raises(error):
        compiled(fail)
    assert gc.isenabled()


def test_threads_that_compile_at_once(compiled):
    """One ends while another compiles, and one begins while another ends."""
    gc.enable()
    enabled = []

    def compiler():
        for _ in range(20):
            enabled.append(gc.isenabled())
            time.sleep(1e-4)

    at_once(*[lambda: [compiled(compiler) for _ in range(5)]] * 4)
    assert enabled == [False] * 400
    assert gc.isenabled()
