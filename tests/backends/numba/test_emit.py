"""The kernels' Python means the same compiled as it does in Python."""

import inspect
import random

import pytest

from fastlstm.backends.numba.kernels.shared import inlined, jit
from fastlstm.backends.numba.kernels.threads import begin_alive
from fastlstm.backends.numba.llvm import emit
from tests.helpers.numba import compiled

SIZE = 12
KNOWN, NOT = True, False


@inlined
def least(a, x, y):
    """What one function hands to another, and a comparison of three."""
    if x <= a.size < y:
        return x, y
    return y, x


@jit
def nothing(x):
    pass


@jit
def arithmetic(a, x, y):
    quotient, rest = x // y, x % y
    low, high = least(a, x, y)
    nothing(x)
    found = quotient * 7 + rest * 11 - (low >> 1) + (high & 5 | 8)
    found += x // 8 + x % 8 + x // 3 + x % 3 + x // -3 + x % -5 - -y
    return found + min(x, y, 3) * 2 + max(-x, y), low


@jit
def decisions(a, x, y):
    found = 0
    if x > 0 and (y > 0 or x != y) and not (x == 3 or a.size < y):
        found = 1
    elif x > 3:
        found = 2
    else:
        found |= x <= y
    if KNOWN and not NOT:
        found += 10
    first, second = (x, y) if x < y else (y, 5) if KNOWN or x else (7, 7)
    either = x > y or y > 5
    either |= x == 2
    return found * 100 + first * (20 if either else 30), second if either and KNOWN else first


@jit
def loops(a, x, y):
    total, k = 0, 0
    for i in range(x):
        if i == 5:
            continue
        for j in range(y, i, -1):
            if j > 9:
                break
            total += i * j
    for i in range(x, y, 3):
        total -= i
    while True:
        k += 2
        if k > x:
            break
    while k < 20:
        k += 3
        if k == y:
            return total, -k
    pairs = (x, 1), (y, total)
    for one, other in pairs:
        total += one * other
    return total, k


class Sizes:
    size = SIZE


@pytest.mark.parametrize("function", [arithmetic, decisions, loops])
def test_the_same_as_in_python(function):
    run = compiled(function, size=SIZE)
    draw = random.Random(0)
    for _ in range(500):
        x, y = draw.randint(-20, 20), draw.choice([-7, -3, -2, -1, 1, 2, 3, 8, 9, 15])
        assert run(x, y) == function(Sizes, x, y), (x, y)


@jit
def quotient(a, x, y):
    return x // y, x % y


def test_division_by_zero_does_not_end_the_process():
    compiled(quotient, size=SIZE)(5, 0)


@jit
def with_a_list(a, x, y):
    return [x], y


@jit
def with_an_end(a, x, y):
    for _ in range(x):
        pass
    else:
        y = 1
    return x, y


@jit
def leaving_a_tuple(a, x, y):
    for one in (x, y):
        if one == 1:
            break
    return x, y


@pytest.mark.parametrize("function", [with_a_list, with_an_end, leaving_a_tuple])
def test_what_a_kernel_may_not_say(function):
    with pytest.raises(NotImplementedError, match=f"test_emit.py:[0-9]+: {function.__name__} .* has "):
        compiled(function, size=SIZE)


def test_a_function_is_found_by_its_line():
    """Decorators and all, whatever else has its name."""
    node = emit._functions_of(inspect.getmodule(begin_alive))[begin_alive.__code__.co_firstlineno]
    assert node.name == "begin_alive"
