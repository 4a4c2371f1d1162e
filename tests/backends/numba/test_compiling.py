"""How kernels are compiled: without the garbage collector, which belongs to the whole process, and heeding signals."""

import ctypes
import gc
import signal
import sys
import threading
import time
from functools import partial

import pytest

from fastlstm.backends.numba.host import compiling, kernel_files, tasks
from tests.helpers import ROOT, interpreter
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


@pytest.fixture
def compiles(monkeypatch):
    """Compiles a kernel again, into no file."""
    monkeypatch.setattr(kernel_files, "folder", lambda: None)
    monkeypatch.setattr(gc, "callbacks", [])  # Python drops what is raised in these, and hypothesis leaves one
    return partial(tasks.compile_and_store, "both")


def test_ctrl_c_within_a_callback_arrives(compiles, ctrl_c, monkeypatch):
    """Python prints and drops what is raised there, and LLVM calls back when it has the machine's code."""
    compiled, dropped = tasks.compiled, []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    monkeypatch.setattr(tasks, "compiled", lambda *names: ctypes.CFUNCTYPE(None)(ctrl_c)() or compiled(*names))
    with pytest.raises(KeyboardInterrupt):
        compiles()
    assert dropped == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_comes_before_the_error_of_a_compilation(compiles, ctrl_c, monkeypatch):
    def fail(*_):
        ctrl_c()
        raise MemoryError

    monkeypatch.setattr(tasks, "compiled", fail)
    with pytest.raises(KeyboardInterrupt) as raised:
        compiles()
    assert isinstance(raised.value.__context__, MemoryError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("is_late", [False, True])
def test_ctrl_c_keeps_no_other_signal_from_its_handler(compiles, ctrl_c, monkeypatch, is_late):
    """Whether it comes during the compilation, or as soon as its own handler is back."""
    late, arrived, set_handler = [ctrl_c] * is_late, [], signal.signal

    def fail(*_):
        signal.raise_signal(signal.SIGTERM)
        if not is_late:
            ctrl_c()
        raise MemoryError

    def set_and_interrupt(number, handler):
        before = set_handler(number, handler)
        if handler is signal.default_int_handler is not before and late:
            late.pop()()
        return before

    def handle(number, _):
        arrived.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    monkeypatch.setattr(tasks, "compiled", fail)
    monkeypatch.setattr(signal, "signal", set_and_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            compiles()
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    finally:
        set_handler(signal.SIGTERM, before)
    assert arrived == [signal.SIGTERM]
    assert handlers == [signal.default_int_handler, handle]


def test_a_thread_compiles_without_signals(compiles):
    at_once(compiles)
    assert tasks.compiled_functions["both"].address


INTERRUPTED = """
    import signal, sys, torch, fastlstm
    signal.signal(signal.SIGINT, signal.default_int_handler)
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "numba.core.codegen":
                signal.raise_signal(signal.SIGINT)
    sys.meta_path.insert(0, Interrupting())
    lstm, x = fastlstm.LSTM(3, 4, backend="numba"), torch.zeros(2, 1, 3)
    try:
        lstm(x)
    except KeyboardInterrupt:
        print("interrupted")
    lstm(x)
"""


def test_ctrl_c_during_the_import_of_numba_arrives():
    """And leaves numba such that the next call can use it."""
    assert interpreter.run(INTERRUPTED, cwd=ROOT, check=True).stdout == "interrupted\n"


def test_a_thread_that_threading_takes_for_the_main_one_compiles(compiles, monkeypatch):
    """Before Python 3.13 it is the one that imported `threading` first, but handlers run in another."""
    monkeypatch.setattr(threading, "main_thread", threading.current_thread)
    at_once(compiles)
    assert tasks.compiled_functions["both"].address


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_raised_as_a_handler_is_replaced(compiles, ctrl_c, monkeypatch, error):
    """By the handler of another signal. It arrives, and the handler comes back."""
    set_handler = signal.signal

    def set_and_raise(number, handler):
        before = set_handler(number, handler)
        if before is signal.default_int_handler and handler is not before:
            raise error
        return before

    with monkeypatch.context() as patched:  # which ends before `ctrl_c` puts a handler back
        patched.setattr(signal, "signal", set_and_raise)
        with pytest.raises(error):
            compiles()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no timer that sends a signal")
def test_a_signal_at_any_moment_of_a_compilation_arrives(compiles, monkeypatch):
    """And leaves numba such that it compiles the next kernel."""

    def interrupt(*_):
        raise KeyboardInterrupt

    begin, dropped = time.monotonic(), []
    compiles()
    duration = time.monotonic() - begin
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: dropped.append(unraisable.exc_type))
    before, arrived = signal.signal(signal.SIGALRM, interrupt), 0
    try:
        for k in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, duration * (k + 0.5) / 60)
                end = time.monotonic() + 60
                while time.monotonic() < end:
                    compiles()
            except KeyboardInterrupt:
                arrived += 1
            if dropped:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (arrived, dropped) == (60, [])
    compiles()


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
