"""What an author may declare."""

import copy
import cProfile
import inspect
import math
import pickle
import pstats
import re
import sys

import numpy as np
import pytest
import torch

import fastlstm
import fastlstm.cells.spec
from fastlstm import cells
from fastlstm.cells import cell, exp, gru, lstm, maximum, relu, sigmoid, stop_gradient, tanh, where
from tests.cells.layers import pre


@cell(gates={"a": "xh"}, states=("h",))
def at_module_level(a, h):
    """What it computes."""
    return tanh(a) + h


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.float64(2)])
def test_functions_take_numbers_of_any_kind(number):
    assert cells.clamp(number, 0, 1) == 1
    assert cells.square(number) == maximum(number, 4) == 4
    assert cells.sqrt(number) == pytest.approx(2**0.5)


def test_a_decorator_without_parentheses():
    for options in ({}, {"gates": {"a": "xh"}, "states": ("h",)}):
        with pytest.raises(TypeError, match=re.escape("write @cell(gates=..., states=...) above it, with parentheses")):
            cell(lambda a: tanh(a), **options)
    assert list(inspect.signature(cell).parameters) == ["gates", "states", "params", "inputs", "products"]


REFUSED = [
    ({"gates": {"a": "xh", "b": "hx"}}, ValueError, 'gate b must sum "x", "h" or "xh", got \'hx\''),
    ({"gates": {"a": "xh", "b": ""}}, ValueError, 'gate b must sum "x", "h" or "xh"'),
    ({"gates": {"a": "xh", "b": None}}, ValueError, 'gate b must sum "x", "h" or "xh", got None'),
    ({"gates": {"a": "xh", "b": "r*h"}}, ValueError, "got 'r*h': for what the step computes declare products=(\"w\",)"),
    ({"products": ("a",)}, ValueError, "the name a is used twice or reserved; rename a gate, state, param, input or p"),
    ({"products": "w"}, TypeError, "products must be a sequence of names, since their order counts, got 'w'"),
    ({"states": ()}, ValueError, "must have a state"),
    ({"states": ("a",)}, ValueError, "the name a is used twice"),
    ({"params": ("p", "p")}, ValueError, "the name p is used twice"),
    ({"params": ("h_prev",)}, ValueError, "the name h_prev is used twice"),
    ({"params": ("dh",)}, ValueError, "the name dh is used twice"),
    ({"params": ("a-b",)}, ValueError, "'a-b' must be a name"),
    ({"params": ("tanh",)}, ValueError, "'tanh' must be a name of ASCII characters, and not a function's"),
    ({"inputs": ("mean",)}, ValueError, "'mean' must be a name of ASCII characters, and not a function's"),
    ({"params": ("lambda",)}, ValueError, "reserved"),
    ({"params": ("double",)}, ValueError, "reserved"),
    ({"states": ("ħ",)}, ValueError, "'ħ' must be a name of ASCII characters"),
    ({"states": ("h", "c")}, TypeError, "must return 2 values, the new h, c, got 1"),
    ({"params": (3,)}, TypeError, "params must be names, got 3"),
    ({"gates": {1: "x"}}, TypeError, "gates must be names, got 1"),
    *(
        ({"gates": gates}, TypeError, f'gates must map names to "x", "h" or "xh", got {gates!r}')
        for gates in (("a", "b"), "ab", None)
    ),
    *(
        ({"params": {"p": start}}, TypeError, f"param p must start from a finite number or None, got {start!r}")
        for start in ("1", math.nan, math.inf, 1j)
    ),
    *(
        ({kind: names}, TypeError, f"{kind} must be a sequence of names, since their order counts, got {names!r}")
        for kind, names in (
            *(("states", names) for names in ({"h"}, {"h": 0.0}, frozenset("h"), "h")),
            *(("inputs", names) for names in ({"p"}, {"p": 1.0})),
        )
    ),
    *(
        ({"params": names}, TypeError, f"a mapping from them, since their order counts, got {names!r}")
        for names in ({"p"}, "p")
    ),
]


@pytest.mark.parametrize(("declared", "error", "message"), REFUSED, ids=str)
def test_what_cannot_be_declared(declared, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pre(lambda a, b: a + b, **declared)


def test_a_value_prints_what_it_is(capsys):
    pre(lambda a, b: print(a, sigmoid(b)) or a + b)
    assert capsys.readouterr().out == "<a value of a cell: a_pre> <a value of a cell: sigmoid>\n"


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
    other = pre(lambda a, b, p, w: a + p * w(b), gates={"a": "x"}, params=("p",), inputs=("b",), products=("w",))
    named = "gates {'a': 'x'}, states ('h',), params ('p',), inputs ('b',), products ('w',)"
    assert repr(other) == f"<cell <lambda>: {named}>"
    assert torch.equal(other(a, h, 1.0, torch.exp), a + h.exp())  # any function of a value stands for a product


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
    one, other = (pre(lambda a, b: a + b) for _ in range(2))
    assert one != other
    assert one == one
    assert len({one, other, one}) == 2


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


def test_a_highway_network_of_any_depth():
    assert cells.rhn(4) is cells.rhn(4)
    assert cells.rhn(4).products == ("n_2", "t_2", "n_3", "t_3", "n_4", "t_4")
    assert (cells.rhn(1).products, cells.rhn(1).params) == ((), ())
    with pytest.raises(ValueError, match="depth must be 1 or more, got 0"):
        cells.rhn(0)
