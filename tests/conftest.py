"""Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before triton is imported.

OpenMP reads how it waits before torch is imported: threads of processes that run side by side would spend most of their
time spinning for one another.
"""

import collections
import functools
import gc
import os
import signal
import sys

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("FASTLSTM_QUIET", "1")  # tests look at what commands print, whether or not kernels are there

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
hypothesis.settings.register_profile("untimed", deadline=None)  # no test asserts a time
hypothesis.settings.load_profile("untimed")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses torch.use_deterministic_algorithms


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    """Of a test with the mark `sampled(n)` all but each n-th case are slow."""
    seen = collections.Counter()
    for item in items:
        if (mark := item.get_closest_marker("sampled")) is not None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


_imported = 0


def pytest_runtest_setup(item):
    """Nothing that an earlier test compiled, or had the compiler give up, counts for this one.

    What imports have made stays to the end: the collector need not look through it again and again.
    """
    global _imported
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if len(sys.modules) > _imported + 200:  # at first, and when a test has brought torch's compiler
        _imported = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or extensions complain of what is left at the end


@pytest.fixture
def backend(request):
    """The name of a backend, parametrized indirectly; new tensors lie on the device that it takes."""
    on_gpu = request.param.startswith("triton") and torch.cuda.is_available()
    torch.set_default_device("cuda" if on_gpu else None)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture
def ctrl_c():
    """Sends this process Ctrl-C's signal, which a script's shell has what it starts in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield functools.partial(signal.raise_signal, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True, scope="session")
def processors_enough():
    """Calls take as many threads as a test asks for, however few processors there are."""
    from fastlstm.backends import cpu  # after the interpreter has been chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "PROCESSORS", 256)
        yield


@pytest.fixture
def set_threads():
    """torch.set_num_threads, until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(set_threads):
    set_threads(2)


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, the pool's and scratch included: what a kernel forgets to write shows."""
    from fastlstm.backends import pool  # after the interpreter has been chosen
    from fastlstm.backends.numba.host import frames
    from tests.helpers.threads import replaced

    class PoisonedScratch(collections.deque):
        def append(self, scratch):
            scratch.memory.fill_(0xFF)
            super().append(scratch)

    def poisoned_memory(shape, strides, dtype):
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")  # which torch fills in this mode

    torch.use_deterministic_algorithms(True)
    scratch = PoisonedScratch()
    scratch.append(pool.Scratch())
    with replaced(pool, empty_on_cpu=poisoned_memory), replaced(frames, scratch=scratch):
        for size in (1 << 21, 1 << 22, 1 << 23):
            pool.pooled(torch.empty(0), size // 4).fill_(float("nan"))
        yield
    torch.use_deterministic_algorithms(False)
