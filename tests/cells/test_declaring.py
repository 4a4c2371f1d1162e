"""What an author may declare, and what every mistake says."""

import contextlib
import copy
import cProfile
import functools
import inspect
import math
import pickle
import pstats
import re
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

import fastlstm
import fastlstm.cells.spec
from fastlstm import cells
from fastlstm.cells import cell, exp, gru, layer_norm, lstm, maximum, mean, relu, sigmoid, stop_gradient, tanh, where
from fastlstm.cells.functions import ALLOWED


@cell(gates={"a": "xh"}, states=("h",))
def at_module_level(a, h):
    """What it computes."""
    return tanh(a) + h


def pre(function, **others):
    """Declare `function` with two gates and a state."""
    return cell(**{"gates": {"a": "xh", "b": "xh"}, "states": ("h",), **others})(function)


MISTAKES = {
    "a method": lambda a, b: a.pow(2),
    "an attribute": lambda a, b: a.shape,
    "a root as a power": lambda a, b: a**0.5,
    "a power of a value": lambda a, b: a**b,
    "a power that is a quotient": lambda a, b: a**-1,
    "a long product": lambda a, b: a**17,
    "a matrix product": lambda a, b: a @ b,
    "a matrix product from the left": lambda a, b: torch.ones(3, 3) @ a,
    "a remainder": lambda a, b: a % b,
    "a function of torch": lambda a, b: torch.sigmoid(a),
    "a function of Python": lambda a, b: math.sqrt(a),
    "a norm of nothing": lambda a, b: layer_norm(),
    "a norm with too few weights": lambda a, b: layer_norm(a, b, weight=(a,)),
    "an if": lambda a, b: a if a > 0.0 else b,
    "an if on a value": lambda a, b: a if a else b,
    "an and": lambda a, b: where(a > 0.0 and b > 0.0, a, b),
    "a chain of comparisons": lambda a, b: where(0.0 < a < 1.0, a, b),
    "an equality": lambda a, b: where(a == b, a, b),
    "max": lambda a, b: max(a, b),
    "an index": lambda a, b: a[0],
    "a loop": lambda a, b: sum(x for x in a),
    "a tensor": lambda a, b: a * torch.ones(3),
    "a tensor in a function": lambda a, b: maximum(a, torch.ones(3)),
    "a comparison as a number": lambda a, b: (a > b) * a,
    "a number as a comparison": lambda a, b: where(a, a, b),
    "too many arguments": lambda a, b: sigmoid(a, b),
    "too few arguments": lambda a, b: where(a > b, a),
    "an infinite constant": lambda a, b: a * float("inf"),
    "division by zero": lambda a, b: a / 0,
    "a string": lambda a, b: a + "b",
    "an undefined name": lambda a, b: softsign(a),  # noqa: F821
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_not_elementwise_arithmetic(mistake):
    """The message has the cell, the line and what is allowed."""
    function = MISTAKES[mistake]
    with pytest.raises(TypeError) as caught:
        pre(function)
    message = str(caught.value)
    assert message.startswith(f"cell <lambda>, line {function.__code__.co_firstlineno} `")
    assert f'"{mistake}": lambda' in message
    assert message.endswith(f"Allowed: {ALLOWED}")


@pytest.mark.parametrize(
    ("function", "written", "name"),
    [
        (lambda a, b: torch.sigmoid(a), "sigmoid", "sigmoid"),
        (lambda a, b: torch.where(a > b, a, b), "where", "where"),
        (lambda a, b: torch.max(a, b), "maximum", "max"),
        (lambda a, b: functional.relu(a), "relu", "relu"),
        (lambda a, b: functional.sigmoid(a), "sigmoid", "sigmoid"),
        (lambda a, b: functional.logsigmoid(a), "log_sigmoid", "log_?sigmoid"),
        (lambda a, b: torch.nn.Tanh()(a), "tanh", "tanh"),
        (lambda a, b: math.exp(a), "exp", "exp"),
        (lambda a, b: math.tanh(a), "tanh", "tanh"),
        (lambda a, b: np.exp(a), "exp", "exp"),
        (lambda a, b: a.sigmoid(), "sigmoid", "sigmoid"),
        (lambda a, b: a.detach(), "stop_gradient", "detach"),
        (lambda a, b: log_sigmoid(a), "log_sigmoid", "log_sigmoid"),  # noqa: F821
        (lambda a, b: torch.mean(a), "mean", "mean"),
        (lambda a, b: a.mean(-1, keepdim=True) + b, "mean", "mean"),
        (lambda a, b: np.mean(a), "mean", "mean"),
        (lambda a, b: functional.layer_norm(a, (3,)), "layer_norm", "layer_norm"),
        (lambda a, b: torch.nn.LayerNorm(3)(a), "layer_norm", "layer_norm"),
        (lambda a, b: functional.rms_norm(a, (3,)), "rms_norm", "rms_norm"),
        (lambda a, b: functional.softplus(a), "softplus", "softplus"),
        (lambda a, b: a.clamp(0, 1), "clamp", "clamp"),
        (lambda a, b: functional.hardsigmoid(a), "hard_sigmoid", "hardsigmoid"),
        (lambda a, b: torch.min(a, b), "minimum", "min"),
        (lambda a, b: np.clip(a, 0, 1), "clamp", "clip"),
        (lambda a, b: torch.amax(a, -1), "maximum", "amax"),
    ],
)
def test_functions_of_others_and_what_stands_for_them(function, written, name):
    """By the name of a function in C, of a method or of what is not imported."""
    words = rf"a cell has functions of its own: write fastlstm.cells.{written}\b.* in the place of this {name}. Allowed"
    with pytest.raises(TypeError, match=words):
        pre(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: a[0], "a value cannot be indexed or looped over: a cell computes the same for each hidden unit"),
        (lambda a, b: sum(a), "a value cannot be indexed or looped over"),
        (lambda a, b: sigmod(a), "name 'sigmod' is not defined (did you mean sigmoid?)"),  # noqa: F821
        (lambda a, b: fastlstm.cells.tanhh(a), "has no attribute 'tanhh' (did you mean tanh?)"),
        (lambda a, b: torch.cos(a), "cos(): argument 'input' (position 1) must be Tensor, not a value of a cell"),
        (lambda a, b: np.prod(a), "a value has no .prod: write functions and operators"),
        (lambda a, b: max(a, b), "is neither true nor false: write where(a > b, x, y) for `if` and `and`, and max"),
        (lambda a, b: caught(math.exp, a) + "b", "and 'str'"),
    ],
)
def test_what_else_is_said_of_mistakes(function, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        pre(function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: tanh(layer_norm(a, b)), "tanh takes a value or a number, got a tuple of 2: layer_norm returns"),
        (lambda a, b: mean((a, b)), "mean takes a value or a number, got a tuple of 2: layer_norm returns one value"),
        (lambda a, b: [mean("x"), a][1], "mean takes a value or a number, got str"),
        (lambda a, b: sigmoid([a, b]), "sigmoid takes a value or a number, got a list of 2"),
        (lambda a, b: exp(None), "exp takes a value or a number, got NoneType"),
        (lambda a, b: maximum(a, (b, b)), "maximum takes values and numbers, got a tuple of 2"),
        (lambda a, b: cells.square((a, b)), "square takes a value or a number, got a tuple of 2"),
        (lambda a, b: cells.minimum((a, b), b), "minimum takes values and numbers, got a tuple of 2"),
        (lambda a, b: cells.softplus((a, b)), "softplus takes a value or a number, got a tuple of 2"),
        (lambda a, b: cells.hard_sigmoid((a, b)), "hard_sigmoid takes a value or a number, got a tuple of 2"),
        (lambda a, b: cells.clamp(a, "0"), "clamp takes values and numbers, got str"),
        (lambda a, b: layer_norm(a, (8,)), "layer_norm takes values and numbers, got a tuple of 1: it takes each"),
        (lambda a, b: cells.rms_norm([a, b]), "got a list of 2: it takes each value as an argument of its own, and no"),
        (lambda a, b: layer_norm(a, weight="b"), "layer_norm takes values and numbers, got str"),
        (lambda a, b: layer_norm(a, eps=None), "layer_norm takes values and numbers, got NoneType"),
    ],
)
def test_functions_take_values_and_numbers_alone(function, message):
    """In a declaration, and where a cell is called on tensors."""
    with pytest.raises(TypeError, match=re.escape(message)):
        pre(function)
    with pytest.raises(TypeError, match=re.escape(message)):
        function(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.float64(2)])
def test_functions_take_numbers_of_any_kind(number):
    assert cells.clamp(number, 0, 1) == 1
    assert cells.square(number) == maximum(number, 4) == 4
    assert cells.sqrt(number) == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda a, b: a.var(-1), "mean((a - mean(a)) ** 2), which has correction=0, in the place of this var"),
        (lambda a, b: torch.std(a), "sqrt(mean((a - mean(a)) ** 2)), which has correction=0, in the place of this std"),
        (lambda a, b: a.sum(-1), "mean(a), times the number of units, in the place of this sum"),
        (lambda a, b: a.chunk(2, -1)[0], "a gate for each part in the place of this chunk"),
        (lambda a, b: functional.silu(a), "a * sigmoid(a) in the place of this silu"),
        (lambda a, b: functional.gelu(a), "a * sigmoid(1.702 * a), which is near to it, in the place of this gelu"),
        (lambda a, b: functional.softmax(a, -1), "exp(a) / mean(exp(a)), which is a softmax over units times their"),
        (lambda a, b: a.softmax(-1), "which is a softmax over units times their number and may overflow, in the place"),
        (lambda a, b: functional.softsign(a), "a / (1 + abs(a)) in the place of this softsign"),
        (lambda a, b: functional.elu(a), "where(a > 0, a, exp(a) - 1) in the place of this elu"),
        (lambda a, b: a.max(-1), "maximum(a, b), which is of two values and not over units, in the place of this max"),
        (lambda a, b: torch.nn.LayerNorm(3)(a), 'layer_norm(a, weight=gain, bias=shift) with params={"gain": 1.0, "sh'),
    ],
)
def test_functions_of_others_and_what_to_write_in_their_place(function, what):
    """Also where torch raises within a function of its own."""
    with pytest.raises(TypeError, match=re.escape(what)):
        pre(function)


@pytest.mark.parametrize(
    ("written", "same"),
    [
        (lambda a: a * sigmoid(a), functional.silu),
        (lambda a: a / (1 + abs(a)), functional.softsign),
        (lambda a: where(a > 0, a, exp(a) - 1), functional.elu),
        (lambda a: where(a > 0, a, 0.01 * a), functional.leaky_relu),
        (lambda a: exp(a) / mean(exp(a)) / 9, lambda a: a.softmax(-1)),
        (lambda a: cells.sqrt(mean((a - mean(a)) ** 2)), lambda a: a.std(-1, correction=0, keepdim=True)),
    ],
)
def test_what_is_written_in_their_place_is_the_same(written, same):
    a = torch.linspace(-3, 3, 9, dtype=torch.double)
    torch.testing.assert_close(*torch.broadcast_tensors(written(a), same(a)))


def caught(function, a):
    """A mistake that is none of the one that ends the declaration."""
    with contextlib.suppress(TypeError):
        function(a)
    return a


def test_a_misspelt_gate():
    with pytest.raises(TypeError, match=r"takes forgot, which is no gate, .* \(did you mean forget\?\); declared are"):
        pre(lambda forgot: forgot, gates={"forget": "xh", "b": "x"})


def test_a_decorator_without_parentheses():
    for options in ({}, {"gates": {"a": "xh"}, "states": ("h",)}):
        with pytest.raises(TypeError, match=re.escape("write @cell(gates=..., states=...) above it, with parentheses")):
            cell(lambda a: tanh(a), **options)
    assert list(inspect.signature(cell).parameters) == ["gates", "states", "params", "inputs"]


def test_the_line_is_the_one_within_the_function():
    def long(a, b):
        c = a * b
        d = c.cosh()
        return d

    with pytest.raises(TypeError, match=r"cell long, line \d+ `d = c\.cosh\(\)`: a value has no \.cosh"):
        pre(long)


def test_the_line_in_a_function_that_is_called():
    def helper(x):
        return x.exp()

    def caller(a, b):
        return helper(a) + b

    with pytest.raises(TypeError, match=r"cell caller, line \d+ `return helper\(a\) \+ b`"):
        pre(caller)


@pytest.mark.parametrize("start", ["1", math.nan, math.inf, 1j])
def test_a_param_starts_from_a_number(start):
    with pytest.raises(TypeError, match=re.escape(f"param p must start from a finite number or None, got {start!r}")):
        pre(lambda a, b, p: a * p, params={"p": start})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, b: (a, b), "must return 1 value, the new h, got 2"),
        (lambda a, b: [], "must return 1 value, the new h, got 0"),
        (lambda a, b: 1.0, "must return a value for h that depends on its arguments, got 1.0"),
        (lambda a, b: None, "must return a value for h that depends on its arguments, got None"),
        (lambda a, b: a > b, "must return a value for h, got a comparison or a constant"),
        (lambda a, b: a * 0 if False else "a", "must return a value for h"),
        (lambda a, other: a, "takes other, which is no gate, state, param or input; declared are a, b, h"),
        (lambda a, x: a + x, "takes x, which is no gate, .*: the gates have the products with x, and x itself may be"),
        (lambda a, *rest: a, r"takes \*rest, which is no gate"),
        (lambda a, **h: a, r"takes \*\*h, which is no gate"),
    ],
)
def test_arguments_and_results(function, message):
    with pytest.raises(TypeError, match=f"cell <lambda> {message}"):
        pre(function)


def test_two_states_and_one_value():
    with pytest.raises(TypeError, match="must return 2 values, the new h, c, got 1"):
        pre(lambda a, b: a, states=("h", "c"))


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"gates": {"a": "xh", "b": "hx"}}, 'gate b must sum "x", "h" or "xh", got \'hx\''),
        ({"gates": {"a": "xh", "b": ""}}, 'gate b must sum "x", "h" or "xh"'),
        ({"gates": {"a": "xh", "b": None}}, 'gate b must sum "x", "h" or "xh", got None'),
        ({"states": ()}, "must have a state"),
        ({"states": ("a",)}, "the name a is used twice"),
        ({"params": ("p", "p")}, "the name p is used twice"),
        ({"params": ("h_prev",)}, "the name h_prev is used twice"),
        ({"params": ("dh",)}, "the name dh is used twice"),
        ({"params": ("a-b",)}, "'a-b' must be a name"),
        ({"params": ("tanh",)}, "'tanh' must be a name of ASCII characters, and not a function's"),
        ({"inputs": ("mean",)}, "'mean' must be a name of ASCII characters, and not a function's"),
        ({"params": ("lambda",)}, "reserved"),
        ({"params": ("double",)}, "reserved"),
    ],
)
def test_declarations(declared, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pre(lambda a, b: a + b, **declared)


def test_names_must_be_strings():
    with pytest.raises(TypeError, match="params must be names, got 3"):
        pre(lambda a, b: a + b, params=(3,))
    with pytest.raises(TypeError, match="gates must be names, got 1"):
        pre(lambda a, b: a + b, gates={1: "x"})


@pytest.mark.parametrize(
    "declared",
    [
        {"states": {"h"}},
        {"states": {"h": 0.0}},
        {"states": frozenset("h")},
        {"states": "h"},
        {"params": {"p"}},
        {"params": "p"},
        {"inputs": {"p"}},
        {"inputs": {"p": 1.0}},
    ],
    ids=str,
)
def test_names_have_an_order(declared):
    (kind, names), *_ = declared.items()
    wanted = "a sequence of names or a mapping from them" if kind == "params" else "a sequence of names"
    message = f"{kind} must be {wanted}, since their order counts, got {names!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        pre(lambda a, b: a + b, **declared)


@pytest.mark.parametrize("gates", [("a", "b"), "ab", None])
def test_gates_must_be_a_mapping(gates):
    with pytest.raises(TypeError, match=re.escape(f'gates must map names to "x", "h" or "xh", got {gates!r}')):
        pre(lambda a, b: a + b, gates=gates)


def test_a_value_prints_what_it_is(capsys):
    pre(lambda a, b: print(a, sigmoid(b)) or a)
    assert capsys.readouterr().out == "<a value of a cell: a_pre> <a value of a cell: sigmoid>\n"
    with pytest.raises(TypeError, match=re.escape("arguments, got {'h': <a value of a cell: a_pre>}")):
        pre(lambda a, b: {"h": a})


@pytest.mark.parametrize("function", [torch.sigmoid, functools.partial(sigmoid, 1.0), None])
def test_a_cell_is_a_python_function(function):
    with pytest.raises(TypeError, match="a cell is declared by a Python function, got"):
        pre(function)


def test_a_profiler_goes_on_after_a_declaration():
    def later():
        return sum([1, 2])

    with cProfile.Profile() as profiler:
        pre(lambda h, a, b: a + b * h)
        later()
    assert any(name == "later" for *_, name in pstats.Stats(profiler).stats)
    seen = []
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_name))
    try:
        pre(lambda h, a, b: a + b * h)
        later()
    finally:
        sys.setprofile(None)
    assert "later" in seen


def test_ways_to_write_that_are_allowed():
    @cell(gates={"a": "xh", "b": "x"}, states=("h", "c"), params=("p",), inputs=("u",))
    def allowed(c, b, a, u, p):  # any order, and h is not needed
        total = +a - b * 2
        for k in range(1, 3):  # loops and conditions on numbers
            total += p * k if k > 1 else -p
        kept = where(total >= u, 1, 0) * c
        return relu(exp(stop_gradient(total) / 3)), kept

    assert allowed.derived().forward.results.keys() >= {"h", "c"}
    assert [f"d{name}" in allowed.derived().backward.results for name in ("a_pre", "p", "u", "c_prev")] == [
        False
    ] * 3 + [True]


def test_local_names_may_be_words_of_c_or_functions():
    @cell(gates={"a": "xh"}, states=("h",))
    def odd(a, h):
        double = sigmoid(a)
        exp = double * h
        do = exp * double
        return do * exp

    from fastlstm.cells.emit import statements

    lines, _ = statements(odd.derived().forward)
    assert not {"double", "exp", "do"} & {name for name, _ in lines}
    x, h = torch.randn(2, 5, dtype=torch.double)
    want = odd(x, h)
    assert torch.equal(odd.derived().forward({"a_pre": x, "h_prev": h})["h"], want)


def test_it_is_called_as_a_function():
    a, h = torch.randn(2, 3)
    assert torch.equal(at_module_level(a, h), a.tanh() + h)
    assert at_module_level(0.0, 2.0) == 2.0
    assert at_module_level.__doc__ == "What it computes."
    assert repr(at_module_level) == "<cell at_module_level: gates {'a': 'xh'}, states ('h',)>"
    other = pre(lambda a, b: a + b, gates={"a": "x"}, params=("p",), inputs=("b",))
    assert repr(other) == "<cell <lambda>: gates {'a': 'x'}, states ('h',), params ('p',), inputs ('b',)>"


def test_pickles_by_reference():
    for one in (at_module_level, *fastlstm.cells.CELLS):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(one, protocol)) is one
        assert copy.deepcopy(one) is one
        assert copy.copy(one) is one


def test_a_local_cell_does_not_pickle():
    local = pre(lambda a, b: a + b)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(local)
    assert copy.deepcopy(local) is local


def test_equality_is_identity():
    one, other = pre(MISTAKE_FREE), pre(MISTAKE_FREE)
    assert one != other
    assert one == one
    assert len({one, other, one}) == 2


def MISTAKE_FREE(a, b):
    return a + b


def test_what_is_printed():
    text = str(gru.derived())
    assert text.startswith("cell gru\n")
    assert "forward: 8 operations (2 sigmoid, 2 mul, 2 add, 1 tanh, 1 sub)" in text
    assert "n = tanh(n_x_pre + r * n_h_pre)" in text
    assert "backward: 15 operations" in text
    assert "saved by forward: n_h_pre r z n" in text
    assert "states read by backward: h_prev" in text


def test_layouts():
    layout = gru.layout
    assert layout.preacts == ("n_x", "r", "z", "n_h")  # x alone, both, h alone
    assert (layout.x_preacts, layout.h_preacts, layout.shared_preacts) == (range(3), range(1, 4), range(1, 3))
    assert (layout.blocks_ih, layout.blocks_hh) == ((2, 0, 1), (0, 1, 2))  # as torch has them: r, z, n
    assert (layout.saved, layout.sequences, layout.carried) == (("n_h_pre", "r", "z", "n"), (), ("h",))
    layout = lstm.layout
    assert layout.preacts == ("i", "f", "g", "o")
    assert layout.x_preacts == layout.h_preacts == layout.shared_preacts == range(4)
    assert (layout.sequences, layout.carried) == (("c",), ("c",))
    layout = fastlstm.cells.ind_rnn.layout
    assert (layout.x_preacts, layout.h_preacts) == (range(1), range(1, 1))
    assert (layout.params, layout.carried) == (("u",), ("h",))


def test_no_argument_has_a_default():
    with pytest.raises(TypeError, match=r"cell f takes h=0.5, but no argument may have a default"):

        @cell(gates={"a": "xh"}, states=("h",))
        def f(a, h=0.5):
            return tanh(a) + h


def test_errors_of_others_call_a_value_a_value():
    """What Python and torch say of a value has no name of a class that authors have never met."""

    def remainder(a):
        return a % 2

    def of_torch(a):
        return torch.cos(a)

    for function in (remainder, of_torch):
        with pytest.raises(TypeError, match="a value of a cell") as raised:
            cell(gates={"a": "xh"}, states=("h",))(function)
        assert "Node" not in str(raised.value)


def test_what_a_cell_takes_from_elsewhere_is_taken_once():
    """Numbers around a cell's function are those of its declaration, in all that is derived from it."""
    made = []
    for k in (1.0, 2.0, 3.0):

        @cell(gates={"a": "xh"}, states=("h",))
        def scaled(a):
            return tanh(a) * k  # noqa: B023

        made.append(scaled)
    k = 0.0
    given = {"a_pre": torch.ones(1)}
    found = [float(each.derived().forward(given)["h"]) for each in made]
    assert found == pytest.approx([each * math.tanh(1.0) for each in (1.0, 2.0, 3.0)])


def test_keys_tell_cells_of_one_name_apart():
    """Caches on disk go by this word: it changes with the arithmetic, and Python does not mangle it."""

    def declared(source):
        made = {"tanh": tanh, "__name__": "__main__"}
        exec(source, made)
        return cell(gates={"a": "xh"}, states=("h",))(made["own"])

    one, other, again = (declared(f"def own(a): return {of}\n") for of in ("tanh(a)", "2.0 * tanh(a)", "tanh(a)"))
    assert one.key.startswith("main___own_")
    assert len({one.key, other.key, again.key}) == 3
    assert again.key == f"{one.key}_2"
    assert fastlstm.cells.spec.by_key(other.key) is other


DECLARED = {"gates": {"a": "xh", "b": "xh"}, "states": ("h", "c"), "params": ("p", "q"), "inputs": ("u", "v")}


@pytest.mark.parametrize(
    "change",
    [
        {"gates": {"a": "x", "b": "h"}},
        {"gates": {"a": "h", "b": "x"}},
        {"gates": {"b": "xh", "a": "xh"}},
        {"states": ("c", "h")},
        {"params": ("q", "p")},
        {"inputs": ("v", "u")},
        {"params": ("p", "u"), "inputs": ("q", "v")},
        {"params": ("p", "q", "unused")},
    ],
    ids=str,
)
def test_keys_tell_all_declarations_apart(change):
    """What gates sum and how values are ordered decides what a cell computes, though its function stays the same."""

    def own(a, b, p, q, u, v):
        return tanh(a) * p * u, sigmoid(b) * q * v

    one, other = (fastlstm.cell(**DECLARED)(own), fastlstm.cell(**{**DECLARED, **change})(own))
    digests = [made.key.split("_own_")[1][:8] for made in (one, other)]
    assert digests[0] != digests[1]


def test_a_key_that_is_missing_is_named():
    with pytest.raises(LookupError, match="no cell mine_0123 has been declared: import the module that declares it"):
        fastlstm.cells.spec.by_key("mine_0123")


def test_names_are_of_ascii():
    with pytest.raises(ValueError, match="'ħ' must be a name of ASCII characters"):
        cell(gates={"a": "xh"}, states=("ħ",))(lambda a: tanh(a))


@pytest.mark.parametrize("name", ["lengths", "reset", "x", "output", "gates"])
def test_params_and_inputs_of_names_that_layers_know(name):
    source = f"def own(a, {name}): return tanh(a) * {name}\n"
    found = {"tanh": tanh, "__name__": "mine"}
    exec(source, found)
    made = fastlstm.Cell(found["own"], {"a": "xh"}, ("h",), (name,), ())
    output, _ = fastlstm.RNN(made, 2, 3)(torch.randn(4, 2, 2))
    assert output.shape == (4, 2, 3)


def test_a_number_beside_integers_is_not_cut_off():
    whole = torch.tensor([1, 2])
    assert torch.equal(cells.maximum(whole, 1.5), torch.maximum(whole.float(), torch.tensor(1.5)))
    assert torch.equal(cells.minimum(1.5, whole), torch.minimum(whole.float(), torch.tensor(1.5)))
