"""The kernels' Python means in a kernel what it means in Python, or is refused."""

import importlib.util
import itertools
import sys
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlstm.backends.numba.kernels.threads import share
from fastlstm.backends.numba.llvm import intrinsics, sources
from tests.helpers.numba import compiled

KNOWN, NOT, SIZE = True, False, 12
numbers = itertools.count()


class Struct:
    size = SIZE


def module_of(folder, source):
    """A module of this source, which a kernel's functions can come from."""
    name = f"kernels{next(numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def least(a, x, y):
    if x <= a.size < y:
        return x, y
    return y, x


def half(x):
    return x // 2


def nothing(x):
    """What a kernel may have in place of another's function."""


def adding(n):
    """A function with a constant of its own."""

    def add(x):
        return x + n

    return add


add_five, add_seven = adding(5), adding(7)


def arithmetic(a, x, y):
    """A docstring is no statement."""
    quotient, rest = x // y, x % y
    low, high = least(a, x, y)
    nothing(x)
    total = quotient * 7 + rest * 11 - (low >> 1) + (high & 5 | 8) + add_five(half(x)) * add_seven(y)
    total += x // 8 + x % 8 + x // 3 + x % 3 + x // -3 + x % -5 + x // -8 + x % -8 + x // 1 - -y
    total |= x & 3
    return total + min(x, y, 3) * 2 + max(-x, y) + (x < y) * 100 + (not x) * 1000, low


def decisions(a, x, y):
    total = 0
    if x > 0 and (y > 0 or x != y) and not (x == 3 or a.size < y):
        total = 1
    elif x > 3:
        total = 2
    else:
        total |= x <= y
    if KNOWN and not NOT:
        total += 10
        lower = y
    first, second = (x, y) if x < y else (y, 5) if KNOWN or x else (7, 7)
    if x == y:
        return lower, -1
    either = x > y or y > 5
    either |= x == 2
    return total * 100 + first * (20 if either else 30) + (x and y) + (x or y), second if either and KNOWN else first


def loops(a, x, y):
    total, k = 0, 0
    for i in range(x):
        if i == 5:
            continue
        for j in range(y, i, -1):
            if j > 9:
                break
            total += i * j
        i += 7  # which the range does not see
    for i in range(x, y, 3):
        total -= i
    for i in range(0, y, a.size):
        total += 2 * i
    while True:
        k += 2
        if k > x:
            break
    while k < 20:
        k += 3
        if k == y:
            return total, -k
        if k > 15:
            continue
        total += 1
    return total, k


@pytest.mark.parametrize("function", [arithmetic, decisions, loops])
def test_as_in_python(function):
    run, draw = compiled(function, size=SIZE), Random(0)
    for _ in range(500):
        x, y = draw.randint(-20, 20), draw.choice([-7, -3, -2, -1, 1, 2, 3, 8, 9, 15])
        assert run(x, y) == function(Struct, x, y), (x, y)


LEAVES = ["x", "y", "u", "v", "a.size", "SIZE", "7", "-3", "0", "True"]
PATTERNS = [
    "{0} + {1}", "{0} - {1}", "{0} * {1}", "-{0}", "{0} >> 2", "{0} & {1}", "{0} | {1}", "{0} // 7", "{0} % -5",
    "{0} // 8", "{0} % 16", "{0} // -4", "{0} // ({1} & 7 | 1)", "{0} % -({1} & 7 | 1)", "{0} < {1} <= {2}",
    "{0} == {1}", "{0} != {1}", "{0} > {1}", "{0} >= {1} or {2}", "not {0}", "{0} and {1}", "{0} or {1}",
    "{0} if {1} else {2}", "min({0}, {1})", "max({0}, {1}, {2})", "half({0})", "half(x={0})",
]  # fmt: skip
EXPRESSIONS = st.recursive(  # of so few factors, none above 110, that no number needs more than 64 bits
    st.sampled_from(LEAVES),
    lambda parts: st.builds(lambda pattern, *p: f"({pattern.format(*p)})", st.sampled_from(PATTERNS), *[parts] * 3),
    max_leaves=8,
)
STATEMENTS = [
    "u = {0} % 101 - 50", "v -= {0} % 50", "v |= {0} & 15", "u, v = ({0}, 3) if {1} else least(a, v, u)",
    "u, v = least(a, y={0}, x=v)", "pass",
    "if {0}:\n{body}", "if {0}:\n{body}\nelse:\n{other}", "if {0}:\n return u, {1}\n{body}",
    "for k{d} in range({0} % 5):\n u = k{d}\n{body}", "for k{d} in range({0} % 7, -3, -2):\n{body}",
    "for k{d} in range(x, 9, {0} % 3 + 4):\n{body}", "k{d} = {0} % 6\nwhile k{d} > 0 and {1}:\n k{d} -= 1\n{body}",
]  # fmt: skip


@st.composite
def statements(draw, depth=0, in_loop=False):
    """Lines of at most three levels, each statement followed by one that keeps the variables small."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        patterns = [pattern for pattern in STATEMENTS if depth < 3 or "{body}" not in pattern]
        pattern = draw(st.sampled_from([*patterns, *["if {0}:\n break", "if {0}:\n continue"] * in_loop]))
        inside = statements(depth + 1, in_loop or "k{d}" in pattern)
        blocks = {name: draw(inside) if name in pattern else [] for name in ("body", "other")}
        texts = {name: "\n".join(f" {line}" for line in block) for name, block in blocks.items()}
        lines += pattern.format(draw(EXPRESSIONS), draw(EXPRESSIONS), d=depth, **texts).splitlines()
        lines.append("u, v = u % 101 - 50, v % 101 - 50")
    return lines


@settings(deadline=None, max_examples=60)
@given(lines=statements(), pairs=st.lists(st.tuples(*[st.integers(-50, 50)] * 2), min_size=5, max_size=5))
def test_any_program(tmp_path_factory, lines, pairs):
    body = "\n ".join(["u, v = x, y", *lines, "return u, v"])
    source = f"from {__name__} import SIZE, half, least\n\ndef program(a, x, y):\n {body}\n"
    program = module_of(tmp_path_factory.mktemp("programs"), source).program
    run = compiled(program, size=SIZE)
    for x, y in pairs:
        assert run(x, y) == program(Struct, x, y), (source, x, y)


REFUSED = """
x = [y]; x = y ** 2; x = y / 2; x = y << 1; x = ~y; x = +y; x = 1.5; x = 'text'; x = None; x = 9223372036854775808
x = unknown; x = a; x = -a; x = a.unknown; x = y.size; a.size = 3; x[0] = 3; x = y = 2; x, y = y; x = y, x; x: int = 2
x = (y, 2) + 1; x = (y, 2) and 3; x = 3 and (y, 2); x = (1, 2) if y else 3; x = 1 if y in (1, 2) else 3; x = x is y
x = (z := 2); x = f'{y}'; x = lambda: 1; x = [z for z in (x, y)]; x = least(a, x, y)[0]; x, (y, x) = 1, 2; x += 1.5
x = half; x = half(y, 2); x = half(z=y); x = half(y, x=y); x = half(**y); x, y = least(a, y=x)
x = min(x=y); x = half(*y); x = half(a); x = least(a, x, y); x, y = least(x, a, y)
x = len(y); x = nothing(y); x = abs(y); x = min(); x = min(y, key=x); x = intrinsics.get_int64(y); x = get_int64()
x = get_int64(a); x = set_int64(x, y); y; 'text'; del x; assert x; raise; import sys; global SIZE; SIZE += 1; x[0] += 1
return least(a, x, y), 1; x = late; for k in (x, y): pass; for k in x: pass
for k in range(0, x, 0): pass; for k in range(): pass; for k, x in range(y): pass
"""
HEAD = f"""from {__name__} import NOT, SIZE, half, intrinsics, least, nothing
from {intrinsics.__name__} import *

def f(a, x, y):
    if x == y:
        return x, y
"""
NEXT = HEAD.count("\n") + 1  # the line that comes next


def refused(folder, *lines):
    """The error of this function, of `HEAD` and these lines."""
    module = module_of(folder, HEAD + "".join(f"    {line}\n" for line in lines))
    with pytest.raises(NotImplementedError) as caught:
        compiled(module.f, size=SIZE)
    return str(caught.value).removeprefix(f"{module.__file__}:")


@pytest.mark.parametrize("statement", [each for line in REFUSED.split("\n") for each in line.split("; ") if each])
def test_what_a_kernel_may_not_say(tmp_path, statement):
    """The error names the line, the function and the statement."""
    message = refused(tmp_path, statement, "return x, y", "late = 1")
    assert message == f"{NEXT}: f cannot be compiled, because of {statement!r}"


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["for k in range(x):", " pass", "else:", " y = 1", "return x, y"], "for k in range(x):"),
        (["while x:", " break", "else:", " y = 1", "return x, y"], "while x:"),
        (["if x > y:", " return", "return x, y"], "return"),
        (["if x > y:", " return y", "return x, y"], "return y"),
        (["if x > y:", " return y, x, 1", "return x, y"], "return y, x, 1"),
        (["if x > y:", " return x, y"], "if x > y:"),  # what it returns otherwise is no number
        (["if x > y:", " z = 1", "return x, z"], "return x, z"),  # which may have none
        (["if x > y:", " z = 1", "else:", " y = 1", "return x, z"], "return x, z"),
        (["for z in range(y):", " pass", "return x, z"], "return x, z"),
        (["while x > y:", " z = x = y", "return x, z"], "z = x = y"),
        (["while x > y:", " z, x = y, y", "return x, z"], "return x, z"),
        (["x = x > y and y > 2 and z", "z = 1", "return x, z"], "x = x > y and y > 2 and z"),
    ],
)
def test_what_may_be_without_a_number(tmp_path, lines, line):
    message = refused(tmp_path, *lines)
    assert message.endswith(f"f cannot be compiled, because of {line!r}")


def test_the_error_is_that_of_the_function_which_is_called(tmp_path):
    source = "def inner(x):\n    x = x + (\n        x ** 2\n    )\n    return x\n\n\n"
    source += "def f(a, x, y):\n    while x > 0:\n        x = inner(y)\n    return x, y\n"
    with pytest.raises(NotImplementedError) as caught:
        compiled(module_of(tmp_path, source).f)
    assert str(caught.value).endswith(".py:2: inner cannot be compiled, because of 'x = x + ('")


def test_division_by_zero_does_not_end_the_process(tmp_path):
    module = module_of(tmp_path, "def f(a, x, y):\n    return x // y, x % y\n")
    compiled(module.f)(5, 0)


def test_a_function_is_found_by_its_line():
    """Decorators and all, whatever else has its name."""
    node = sources.functions_of(share.__module__)[share.__code__.co_firstlineno]
    assert node.name == "share"
