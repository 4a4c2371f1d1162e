"""Forks while another thread is at work: the child goes on alone, with what the thread has finished."""

import os
import signal
import threading
import time

import pytest
import torch

import fastlstm
from fastlstm import operator_patching, patching
from fastlstm.backends import pool
from fastlstm.cells import spec
from tests.helpers import ROOT, interpreter

if not hasattr(os, "fork"):
    pytest.skip("the system has no fork", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")

CALL = """
    import os, signal, sys, threading, time, torch, fastlstm
    from fastlstm.cells import library, spec

    begun = threading.Event()
    module, same = fastlstm.LSTM(3, 4, backend="numba"), fastlstm.LSTM(3, 4, backend="reference")
    same.load_state_dict(module.state_dict())
    x = torch.randn(2, 1, 3)
    # torch's own operations, all once: a child hangs in one which another thread runs for the first time meanwhile
    zeros = torch.zeros(2, 1, 3), torch.zeros_like(torch.tensor(x.tolist()).detach())
    other = fastlstm.GRU(3, 4, backend="reference")  # whose cell is not the one that is derived below
    assert torch.allclose(*(other(a)[0] for a in zeros))

    def begins(function):  # so that the fork comes within it
        def begin(*arguments):
            begun.set()
            time.sleep(0.2)
            return function(*arguments)
        return begin

    {within}

    def call():
        with torch.no_grad():
            return torch.allclose(module(x)[0], same(x)[0])

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # the default action ends a child that hangs
        os._exit(0 if call() else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join()
    assert call()
"""
WITHIN = {
    "the import of numba": """
    class Watching:
        def find_spec(self, name, *_):
            if name == "numba.core.codegen":
                begins(bool)()
    sys.meta_path.insert(0, Watching())
    """,
    "a cell's derivation": """
    spec.Layout = begins(spec.Layout)
    """,
    "the compilation of a kernel": """
    from fastlstm.backends.numba.host import compiling, kernel_files
    load = kernel_files.load
    kernel_files.load = lambda name: None if name.startswith("cell") else load(name)
    compiling.cfunc = begins(compiling.cfunc)
    """,
}


@pytest.mark.parametrize("within", WITHIN)
def test_within_the_first_call_of_another_thread(within):
    interpreter.run(CALL.replace("    {within}\n", WITHIN[within]), cwd=ROOT, check=True)


def declare():
    def leaky(g, h):
        return h + g

    fastlstm.cells.cell(gates={"g": "x"}, states=("h",))(leaky)


def patch():
    with fastlstm.patch():
        pass


def patch_operators():
    with fastlstm.patch_operators():
        pass


def allocate():
    pool.pooled(torch.empty(0), pool.SMALL)


@pytest.mark.parametrize(
    ("lock", "use"),
    [
        (spec._declaring, declare),
        (patching._lock, patch),
        (operator_patching._lock, patch_operators),
        (pool._lock, allocate),
    ],
)
def test_what_another_thread_holds(lock, use):
    """A child can do what the thread was doing."""
    is_held = threading.Event()

    def hold():
        with lock:
            is_held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # the default action ends a child that hangs
        use()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    thread.join()
