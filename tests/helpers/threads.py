"""Threads of Python that do something at once, and kernels on a given number of teams and threads."""

import ctypes
import functools
import inspect
import threading
from contextlib import contextmanager

import pytest
import torch
from hypothesis import strategies as st

from fastlstm.backends import csrc, pool
from fastlstm.backends.numba.host import plans, sizes, thread_split
from fastlstm.layers import functional

MOST = 5  # threads, which may be more than the cores
# Teams and the threads of each. One thread comes first, since hypothesis tries to explain a failure by what is first.
SPLITS = [(teams, members) for teams in range(1, MOST + 1) for members in range(1, MOST // teams + 1)]
splits = st.sampled_from(SPLITS)


def at_once(*functions, timeout=120):
    """Run the functions in threads of their own that begin together. What one of them raises is raised here."""
    begin, errors = threading.Barrier(len(functions)), []

    def run(function):
        begin.wait()
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def forget():
    """What is kept by signature knows the limits that held when it was made; what modules keep is theirs to forget."""
    pool.new_of.cache_clear()  # makers of tensors, which hold the function that gives memory
    plans._forward.cache_clear()
    plans._backward.cache_clear()
    functional._plans.plans.clear()


@contextmanager
def replaced(module, **values):
    """Within it, names of a module have other values. What is kept by signature is made anew, within it and after."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(module, name, value)
        forget()
        try:
            yield
        finally:
            forget()


limits = functools.partial(replaced, sizes)


@contextmanager
def split(teams, members):
    """Within it, `numba` and `native` run each layer on so many teams of so many threads, whatever its size. Modules
    that have been called before keep the split that they had.
    """
    count, before = teams * members, torch.get_num_threads()
    pair = ctypes.c_int64 * 2
    forced = pair() if csrc.reason else pair.in_dll(csrc.library, "fastlstm_forced_split")
    with replaced(thread_split, split_threads=lambda *_: (count, teams)):
        torch.set_num_threads(count)  # by which plans are kept apart
        try:
            forced[:] = teams, members
            yield
        finally:
            forced[:] = 0, 0
            torch.set_num_threads(before)


def on_any_split(test):
    """Give a property test a last argument, drawn from `splits`, and run it within `split`."""

    signature = inspect.signature(test)
    last = inspect.Parameter("threads", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    extended = signature.replace(parameters=[*signature.parameters.values(), last])

    @functools.wraps(test)
    def run(*arguments, **named):
        bound = extended.bind(*arguments, **named)
        with split(*bound.arguments.pop("threads")):
            test(*bound.args, **bound.kwargs)

    run.__signature__ = extended
    return run
