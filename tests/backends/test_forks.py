"""Forks while another thread is at work: the child goes on alone, with what the thread has finished."""

import os
import signal
import sys
import threading
import time
from itertools import count

import pytest
import torch

import fastlstm
from fastlstm import forks, operator_patching, patching
from fastlstm.backends import pool
from fastlstm.backends.numba.host.compiling import global_compiler_lock
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


LOCKS = [spec._declaring, patching._lock, operator_patching._lock, pool._lock, global_compiler_lock]
forks_begin = threading.Event()
os.register_at_fork(before=forks_begin.set)  # which runs before the package's own, since it is registered after them


class Interruption(Exception):
    pass


def fork_beside(work):
    """Fork while another thread holds a lock, does this work, and lets go. Return whether a new thread gets every lock,
    in the child and in the parent.
    """
    is_held = threading.Event()

    def hold():
        with LOCKS[1]:
            is_held.set()
            forks_begin.wait(60)
            work()

    def are_free():
        def take():
            for lock in LOCKS:
                with lock:
                    pass

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(10)
        return not thread.is_alive()

    forks_begin.clear()
    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()
    child = os.fork()
    sys.settrace(None)
    if child == 0:
        os._exit(0 if are_free() else 1)
    thread.join()
    return os.waitpid(child, 0)[1] == 0, are_free()


@pytest.fixture
def dropped(monkeypatch):
    """The types of the errors that Python drops in this test."""
    types = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: types.append(unraisable.exc_type))
    return types


def test_what_is_raised_at_any_bytecode_of_a_fork(dropped):
    """As the handler of a signal may raise there. It is dropped, and everything is as without it."""

    def interrupt_after(steps):
        passed = count()

        def trace(frame, event, _):
            if frame.f_code.co_filename != forks.__file__:
                return None
            frame.f_trace_opcodes = True
            if next(passed) == steps:
                raise Interruption
            return trace

        sys.settrace(trace)

    before, outcomes = sys.gettrace(), []
    try:
        # up to a fork that ends before its interruption, or one that leaves a lock behind
        while dropped.count(Interruption) == outcomes.count((True, True)) == len(outcomes):
            interrupt_after(len(outcomes))
            outcomes.append(fork_beside(lambda: time.sleep(0.01)))
    finally:
        sys.settrace(before)
    assert set(outcomes) == {(True, True)}
    assert set(dropped) == {Interruption}


def test_what_is_raised_while_a_fork_waits(dropped):
    def interrupt(*_):
        raise Interruption

    def work():
        for _ in range(2):
            time.sleep(0.1)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)
        time.sleep(0.1)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        outcome = fork_beside(work)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert outcome == (True, True)
    assert set(dropped) == {Interruption}
