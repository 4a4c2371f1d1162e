"""What is said of every mistake in a cell's function."""

import contextlib
import functools
import linecache
import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional

import fastlstm
from fastlstm import cells
from fastlstm.cells import exp, layer_norm, maximum, mean, sigmoid, tanh, where
from fastlstm.cells.functions import ALLOWED
from tests.cells.layers import pre


def unquoted(error):
    """The message of an error without the line of this file that it quotes, where the expected words stand, too."""
    text = str(error.value)
    line = re.search(r"line (\d+) `", text)
    return text.replace(linecache.getline(__file__, int(line[1])).strip(), "") if line else text


class StraightThrough(torch.autograd.Function):
    """A derivative of one's own, as PyTorch has it."""

    forward = staticmethod(lambda context, a: (a > 0).to(a))
    backward = staticmethod(lambda context, grad: grad)


MISTAKES = {
    "a method": lambda a, b: a.pow(2),
    "an attribute": lambda a, b: a.shape,
    "a root as a power": lambda a, b: a**0.5,
    "a power of a value": lambda a, b: a**b,
    "a power that is a quotient": lambda a, b: a**-1,
    "a long product": lambda a, b: a**17,
    "a remainder": lambda a, b: a % b,
    "a function of Python": lambda a, b: math.sqrt(a),
    "a norm of nothing": lambda a, b: layer_norm(),
    "a norm with too few weights": lambda a, b: layer_norm(a, b, weight=(a,)),
    "an if": lambda a, b: a if a > 0.0 else b,
    "an if on a value": lambda a, b: a if a else b,
    "an and": lambda a, b: where(a > 0.0 and b > 0.0, a, b),
    "a chain of comparisons": lambda a, b: where(0.0 < a < 1.0, a, b),
    "a loop": lambda a, b: sum(x for x in a),
    "a tensor in a function": lambda a, b: maximum(a, torch.ones(3)),
    "a comparison as a number": lambda a, b: (a > b) * a,
    "too many arguments": lambda a, b: sigmoid(a, b),
    "too few arguments": lambda a, b: where(a > b, a),
    "an infinite constant": lambda a, b: a * float("inf"),
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
        (lambda a, b: StraightThrough.apply(a), "surrogate", "apply"),
    ],
)
def test_functions_of_others_and_what_stands_for_them(function, written, name):
    """By the name of a function in C, of a method or of what is not imported."""
    words = rf"a cell has functions of its own: write fastlstm.cells.{written}\b.* in the place of this {name}. Allowed"
    with pytest.raises(TypeError, match=words):
        pre(function)


def caught(function, a):
    """A mistake that is none of the one that ends the declaration."""
    with contextlib.suppress(TypeError):
        function(a)
    return a


SAID = [
    (lambda a, b: a[0], "a value cannot be indexed or looped over: a cell computes the same for each hidden unit"),
    (lambda a, b: sum(a), "mean(a), times the number of units, in the place of this sum"),
    (lambda a, b: sigmod(a), "name 'sigmod' is not defined (did you mean sigmoid?)"),  # noqa: F821
    (lambda a, b: fastlstm.cells.tanhh(a), "has no attribute 'tanhh' (did you mean tanh?)"),
    (lambda a, b: torch.cos(a), "cos(): argument 'input' (position 1) must be Tensor, not a value of a cell"),
    (lambda a, b: np.prod(a), "a value has no .prod: write functions and operators"),
    (lambda a, b: max(a, b), "write fastlstm.cells.maximum(a, b), which is of two values and not over units, in the"),
    (lambda a, b: a or b, "is neither true nor false: write where(a > b, x, y) for `if` and `and`, and maximum(a, b)"),
    (lambda a, b: caught(math.exp, a) + "b", "and 'str'"),
    # what a cell reads beside its gates, on either side of an operator or in a function
    *(
        (function, f'got {given}: a cell takes numbers, as a.item(), and what it declares: params=("p",) for vectors')
        for given, functions in (
            (
                "Tensor of shape (3,)",
                (
                    lambda a, b: a * torch.ones(3),
                    lambda a, b: torch.ones(3) * a,
                    lambda a, b: torch.ones(3) > a,
                    lambda a, b: maximum(a, torch.ones(3)),
                ),
            ),
            ("Tensor of shape ()", (lambda a, b: a + torch.tensor(2.0), lambda a, b: torch.tensor(2.0) + a)),
            (
                "ndarray of shape (3,)",
                (lambda a, b: a * np.ones(3), lambda a, b: np.ones(3) * a, lambda a, b: sigmoid(a) >= np.ones(3)),
            ),
        )
        for function in functions
    ),
    (lambda a, b: a**0.5, "a whole number from 1 to 16, got 0.5: write sqrt(a), rsqrt(a), 1 / a or exp(p * log(a))"),
    (
        lambda a, b: a**b,
        "a whole number from 1 to 16, got <a value of a cell: b_pre>: write sqrt(a), rsqrt",
    ),
    (
        lambda a, b: 2**a,
        "a whole number from 1 to 16, got a value: write exp(a * log(2)) in the place of 2 ** a",
    ),
    (lambda a, b: 0.5**a, "write exp(a * log(0.5)) in the place of 0.5 ** a"),
    (lambda a, b: np.ones(3) ** a, "got ndarray of shape (3,): a cell takes numbers, as a.item()"),
    (lambda a, b: where(a, a, b), "the first argument of where must be a comparison"),
    (lambda a, b: where(a == b, a, b), "== and != of values have no place in a cell"),
    (lambda a, b: a / 0, "division by the constant 0"),
    # what to write in the place of a function, also where torch raises within one of its own
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
    *(
        (function, f'write w(a), with products=("w",) beside gates, in the place of this {name}')
        for function, name in (
            (lambda a, b: torch.matmul(a, torch.ones(3, 3)), "matmul"),
            (lambda a, b: torch.einsum("i,ij->j", a, torch.ones(3, 3)), "einsum"),
            (lambda a, b: torch.nn.Linear(3, 3)(a), "linear"),
            (lambda a, b: functional.linear(a, torch.ones(3, 3)), "linear"),
            (lambda a, b: a.mm(torch.ones(3, 3)), "mm"),
        )
    ),
    (lambda a, b: a @ b, 'a cell writes no @: declare products=("w",) beside gates, and write w(a)'),
    (lambda a, b: torch.ones(3, 3) @ a, 'a cell writes no @: declare products=("w",) beside gates'),
    (lambda a, b: a(b), 'a value is no function: declare products=("w",) beside gates, and write w(a)'),
    (lambda a, b: torch.nn.LayerNorm(3)(a), 'layer_norm(a, weight=gain, bias=shift) with params={"gain": 1.0, "sh'),
    # arguments and results
    (lambda a, b: (a, b), "cell <lambda> must return 1 value, the new h, got 2"),
    (lambda a, b: [], "cell <lambda> must return 1 value, the new h, got 0"),
    (lambda a, b: 1.0, "cell <lambda> must return a value for h that depends on its arguments, got 1.0"),
    (lambda a, b: None, "cell <lambda> must return a value for h that depends on its arguments, got None"),
    (lambda a, b: a > b, "cell <lambda> must return a value for h, got a comparison or a constant"),
    (lambda a, b: a * 0 if False else "a", "cell <lambda> must return a value for h"),
    (
        lambda a, other: a,
        "cell <lambda> takes other, which is no gate, state, param, input or product; declared are a, b, h",
    ),
    (
        lambda a, x: a + x,
        "cell <lambda> takes x, which is no gate, ...: the gates have the products with x, and x",
    ),
    (lambda a, *rest: a, "cell <lambda> takes *rest, which is no gate"),
    (lambda a, **h: a, "cell <lambda> takes **h, which is no gate"),
    (lambda a, b=0.5: a + b, "cell <lambda> takes b=0.5, but no argument may have a default"),
    (lambda a, b: {"h": a}, "arguments, got {'h': <a value of a cell: a_pre>}"),
    *(
        (function, "a cell is declared by a Python function, got")
        for function in (torch.sigmoid, functools.partial(sigmoid, 1.0), None)
    ),
]


@pytest.mark.parametrize(("function", "message"), SAID)
def test_what_is_said_of_mistakes(function, message):
    """Three dots stand for words that vary. No class is named that authors have never met."""
    with pytest.raises(TypeError) as raised:
        pre(function)
    assert re.search(".*".join(map(re.escape, message.split("..."))), unquoted(raised))
    assert "Node" not in str(raised.value)


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
        (
            lambda a, b: layer_norm(a, 32),
            "argument 2 of layer_norm must be a value of each unit, got 32: it takes each value as an argument of",
        ),
        (lambda a, b: cells.rms_norm(0.5, a), "argument 1 of rms_norm must be a value of each unit, got 0.5: it takes"),
        (lambda a, b: cells.rms_norm([a, b]), "got a list of 2: it takes each value as an argument of its own, and no"),
        (lambda a, b: layer_norm(a, weight="b"), "layer_norm takes values and numbers, got str"),
        (lambda a, b: layer_norm(a, eps=None), "layer_norm takes values and numbers, got NoneType"),
    ],
)
def test_functions_take_values_and_numbers_alone(function, message):
    """In a declaration, and where a cell is called on tensors."""
    with pytest.raises(TypeError) as raised:
        pre(function)
    assert message in unquoted(raised)
    with pytest.raises(TypeError, match=re.escape(message)):
        function(torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    ("written", "same"),
    [
        (lambda a: a * sigmoid(a), functional.silu),
        (lambda a: a / (1 + abs(a)), functional.softsign),
        (lambda a: where(a > 0, a, exp(a) - 1), functional.elu),
        (lambda a: where(a > 0, a, 0.01 * a), functional.leaky_relu),
        (lambda a: exp(a * cells.log(0.5)), lambda a: 0.5**a),
        (lambda a: exp(a) / mean(exp(a)) / 9, lambda a: a.softmax(-1)),
        (lambda a: cells.sqrt(mean((a - mean(a)) ** 2)), lambda a: a.std(-1, correction=0, keepdim=True)),
    ],
)
def test_what_is_written_in_their_place_is_the_same(written, same):
    a = torch.linspace(-3, 3, 9, dtype=torch.double)
    torch.testing.assert_close(*torch.broadcast_tensors(written(a), same(a)))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a, w: w(2.0) + a, "w multiplies a value of each unit, got float"),
        (lambda a, w: w(w) + a, "w multiplies a value of each unit, got <the product w of a cell>"),
        (lambda a, w: w(mean(a)) + a, "w multiplies a value of each unit, got <a value of a cell: mean>, which all un"),
        (lambda a, w: w(a > 0) + a, "w multiplies a value of each unit, got <a value of a cell: greater>"),
        (
            lambda a, w: w(a) + w(tanh(a)),
            "w is used twice: declare a product for each value, and to share their weight",
        ),
        (lambda a, w: w(a, a), "w multiplies one value, got 2: declare a product for each value"),
        (lambda a, w: w(), "w multiplies one value, got 0"),
        (lambda a, w: w(a) + w.bias, "a product has no .bias: call it, as w(a), and for a bias take one of params"),
        (lambda a, w: w(a) - w.T(a), "a product has no .T: call it, as w(a)"),
        (lambda a, w: w * a, "unsupported operand type(s) for *: a product, which takes a value: w(a), and a value of"),
        (lambda a, w: tanh(w) + a, "tanh takes a value or a number, got Product"),
        (lambda a, w: a @ w, "a cell writes no @"),
    ],
)
def test_products_that_are_used_wrongly(function, message):
    """The message has the line."""
    with pytest.raises(TypeError) as raised:
        pre(function, gates={"a": "xh"}, products=("w",))
    assert str(raised.value).startswith(f"cell <lambda>, line {function.__code__.co_firstlineno} `")
    assert message in unquoted(raised)


def test_gates_and_products_that_no_state_depends_on():
    for function in (lambda a, w: tanh(a), lambda a, w: (w(a), tanh(a))[1], lambda a: tanh(a)):
        with pytest.raises(TypeError, match="cell <lambda>: no new state depends on w; leave it out"):
            pre(function, gates={"a": "xh"}, products=("w",))
    for function in (lambda a, b: tanh(a), lambda a: tanh(a), lambda a, b: (tanh(b), tanh(a))[1]):
        with pytest.raises(TypeError, match="cell <lambda>: no new state depends on b; leave it out"):
            pre(function)
    with pytest.raises(TypeError, match=r"must return a value for h that depends on .*, got <the product w of a cell>"):
        pre(lambda a, w: w, gates={"a": "xh"}, products=("w",))


@pytest.mark.parametrize("number", [np.float64(2), np.float32(2), np.int64(2)])
def test_numbers_of_numpy_are_numbers(number):
    def declared(two):
        return pre(lambda a: maximum(a * two, two - a), gates={"a": "xh"}).derived()

    assert str(declared(number)) == str(declared(2.0))


def test_a_misspelt_gate():
    with pytest.raises(TypeError, match=r"takes forgot, which is no gate, .* \(did you mean forget\?\); declared are"):
        pre(lambda forgot: forgot, gates={"forget": "xh", "b": "x"})


def test_the_line_is_the_one_within_the_function():
    """Also where the mistake is in another function, which it calls."""

    def helper(x):
        return x.cosh()

    def caller(a, b):
        c = a * b
        d = helper(c)
        return d

    with pytest.raises(TypeError, match=r"cell caller, line \d+ `d = helper\(c\)`: a value has no \.cosh"):
        pre(caller)
