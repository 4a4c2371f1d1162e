"""Kernels whose threads leave each barrier, and begin each step and each phase, after a random delay.

Threads that run side by side reach the places where they meet at about the same time. So a missing barrier, or data
that two of them share by mistake, would show in few runs. With these delays it shows in nearly every one.
"""

import ctypes
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from fastlstm.backends import csrc
from fastlstm.backends.numba.host import kernel_files, tasks
from fastlstm.backends.numba.kernels import backward, forward, states, threads, values
from fastlstm.backends.numba.llvm.intrinsics import call_int
from tests.helpers import ROOT
from tests.helpers.threads import forget, replaced

# The kernels' functions that the ones below call, and replace in the kernels.
wait_at_once, wait_for_at_once = threads.wait, threads.wait_for
enter_step_at_once, begin_phase_at_once = states.enter_step, states.begin_phase


@ctypes.CFUNCTYPE(ctypes.c_int)
def _delay():
    """Take the place of `sched_yield`, which a thread that waits calls."""
    time.sleep(random.choice((0, 0, 0, 3e-4)))
    return 0


def wait(barrier, threads, barriers_passed, relax):
    passed = wait_at_once(barrier, threads, barriers_passed, relax)
    if threads > 1:
        call_int(relax)
    return passed


def wait_for(barrier, threads, times, relax):
    wait_for_at_once(barrier, threads, times, relax)
    if threads > 1:
        call_int(relax)


def enter_step(a, table, s, t, h_prev, h_prev_row, h, h_row, count, is_one_row):
    call_int(a.relax)
    enter_step_at_once(a, table, s, t, h_prev, h_prev_row, h, h_row, count, is_one_row)


def begin_phase(a, kernel, phase, t, b, rows, gate_rows, scratch, is_one_row):
    call_int(a.relax)
    begin_phase_at_once(a, kernel, phase, t, b, rows, gate_rows, scratch, is_one_row)


@contextmanager
def delays_in_numba():
    """Within it, kernels of `numba` have delays. Their files are others: this module's source is part of their key."""
    source, identity_of, path_of = Path(__file__).read_bytes(), kernel_files._identity, kernel_files._path_of
    kernels = [name for name in tasks.KERNELS if name.startswith(("forward", "backward"))]
    kept = tasks.compiled_functions
    functions = {name: function for name, function in kept.items() if name not in kernels} | _compiled

    def identity(name):
        return kernel_files._digest(identity_of(name), source) if name in kernels else identity_of(name)

    with pytest.MonkeyPatch.context() as patch:
        for replacement in (wait, wait_for, enter_step, begin_phase):
            for module in (forward, backward, values):
                patch.setattr(module, replacement.__name__, replacement, raising=False)
        patch.setattr(kernel_files, "_identity", identity)
        patch.setattr(kernel_files, "_path_of", lambda name: path_of(f"{name}-delayed" if name in kernels else name))
        patch.setattr(tasks, "compiled_functions", functions)
        patch.setattr(tasks, "task", cache(tasks.task.__wrapped__))
        patch.setattr(tasks, "relax", lambda: ctypes.cast(_delay, ctypes.c_void_p).value)
        forget()
        try:
            yield
        finally:
            for name, function in functions.items():
                (_compiled if name in kernels else kept)[name] = function
            forget()


_compiled = {}  # the kernels with delays that this process has


def build_native(folder):
    """The library of csrc/ with delays, built in a folder."""
    pause = "-include unistd.h -include stdlib.h -DPAUSE()=(rand()%4?0:usleep(300))"
    command = sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder
    environment = os.environ | {"CFLAGS": pause, "CXXFLAGS": pause, "FASTLSTM_NATIVE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return folder / "fastlstm" / csrc.LIBRARY.name


@contextmanager
def delays_in_native(library):
    """Within it, `native` calls another library, that of `build_native`."""
    with replaced(csrc, LIBRARY=library), replaced(csrc, library=csrc._load()):
        yield
