"""What is derived against formulas by hand, autograd, and the bits of the LSTM as it was written by hand."""

import math

import pytest
import torch

from fastlstm import cells
from fastlstm.cells import cell as declare
from fastlstm.cells import exp, log_sigmoid, maximum, relu, sigmoid, stop_gradient, tanh, where
from fastlstm.cells.derive import PARTIALS
from fastlstm.cells.emit import Function, load, python
from fastlstm.cells.functions import FUNCTIONS
from fastlstm.cells.graph import Graph
from tests.cells import by_hand
from tests.cells.layers import error

LOOSE = {"allow_unused": True, "materialize_grads": True}


def values(names, dtype=torch.double, count=64):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(count, generator=generator, dtype=torch.double).to(dtype) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_lstm_has_the_bits_of_the_one_by_hand(dtype):
    given = values(["i", "f", "g", "o", "c", "dh", "dc"], dtype, 4096)
    forward, backward = cells.lstm.derived().forward, cells.lstm.derived().backward
    assert tuple(forward.arguments) == ("i_pre", "f_pre", "g_pre", "o_pre", "c_prev")
    assert tuple(forward.results) == ("h", "c", "i", "f", "g", "o")
    assert tuple(backward.arguments) == ("dh", "dc", "i", "f", "g", "o", "c_prev")
    assert tuple(backward.results) == ("di_pre", "df_pre", "dg_pre", "do_pre", "dc_prev")
    want = by_hand.forward(*(given[name] for name in "ifgoc"), torch.sigmoid, torch.tanh)
    got = forward(dict(zip(forward.arguments, (given[name] for name in "ifgoc"))))
    assert all(map(torch.equal, got.values(), want))
    gates = dict(zip("ifgo", want[2:]))
    expected = by_hand.backward(given["dh"], given["dc"], *gates.values(), given["c"], torch.tanh)
    found = backward({"dh": given["dh"], "dc": given["dc"], **gates, "c_prev": given["c"]})
    assert all(map(torch.equal, found.values(), expected))


def test_the_lstm_fuses_as_the_one_by_hand():
    """On a machine with fused multiply-adds too, whose bits depend on which products are fused into which sums."""
    derived, names = cells.lstm.derived(), {"sigmoid": by_hand.fused("sigmoid"), "tanh": by_hand.fused("tanh")}
    for function, expected, wanted in (
        (derived.forward, by_hand.forward, names),
        (derived.backward, by_hand.backward, {"tanh": names["tanh"]}),
    ):
        code = load(python(function), function.name, names)
        got = code(*map(by_hand.Fused, function.arguments))
        want = expected(*map(by_hand.Fused, function.arguments), **wanted)
        assert [a.text for a in got] == [a.text for a in want]
        assert any("fma" in a.text for a in want)


def test_operations():
    """As many as by hand, or fewer."""
    graph = Graph()
    args = {name: graph.input(name) for name in ["dh", "dc", "i", "f", "g", "o", "c_prev"]}
    hand = Function("by hand", args, dict(enumerate(by_hand.backward(*args.values(), tanh))))
    assert cells.lstm.derived().backward.count == hand.count == 26
    assert cells.lstm.derived().forward.count == 9
    assert cells.gru.derived().forward.count == 8


def test_the_gru_by_hand():
    given = values(["r_pre", "z_pre", "n_x_pre", "n_h_pre", "h_prev", "dh"])
    found = cells.gru.derived().forward(given)
    r, z = given["r_pre"].sigmoid(), given["z_pre"].sigmoid()
    n = (given["n_x_pre"] + r * given["n_h_pre"]).tanh()
    h = (1 - z) * n + z * given["h_prev"]
    assert error(found["h"], h) < 1e-15
    gradients = cells.gru.derived().backward({**given, **found})
    dn = given["dh"] * (1 - z) * (1 - n * n)
    dr, dz = dn * given["n_h_pre"] * r * (1 - r), given["dh"] * (given["h_prev"] - n) * z * (1 - z)
    want = {"dr_pre": dr, "dz_pre": dz, "dn_x_pre": dn, "dn_h_pre": dn * r, "dh_prev": given["dh"] * z}
    assert gradients.keys() == want.keys()
    assert all(error(gradients[name], want[name]) < 1e-15 for name in want)


def test_the_curvature_of_the_lstm_by_hand():
    given = values(["i_pre", "f_pre", "g_pre", "o_pre", "c_prev", "dh", "dc"])
    along = {f"{name}_t": a.flip(0) for name, a in given.items()}
    i, f, o = (given[f"{gate}_pre"].sigmoid() for gate in "ifo")
    g, tangents = given["g_pre"].tanh(), tuple(along[f"{gate}_pre_t"] for gate in "ifgo")
    bend = 1.0 - (f * given["c_prev"] + i * g).tanh() ** 2
    whole = given["dh"] * o * bend + given["dc"]
    want = by_hand.curvature(given["dh"], whole, i, f, g, o, given["c_prev"], tangents, along["c_prev_t"])
    got = cells.lstm.derived().curvature({**given, **along})
    names = ["di_pre_t", "df_pre_t", "dg_pre_t", "do_pre_t", "dc_prev_t"]
    assert all(error(got[name], a) < 1e-14 for name, a in zip(names, want))


EXPRESSIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a, b: -a * b,
    "constants": lambda a, b: (2.0 - a) / 3 + 1 / b - 0.5 * a,
    "sigmoid": lambda a, b: sigmoid(a) * b,
    "tanh": lambda a, b: tanh(a) * b,
    "relu": lambda a, b: relu(a) * b,
    "exp": lambda a, b: exp(a) * b,
    "log_sigmoid": lambda a, b: log_sigmoid(a) * b,
    "maximum": lambda a, b: maximum(a, b) * a,
    "maximum_with_a_number": lambda a, b: maximum(0.5, a) * b,
    "greater": lambda a, b: where(a > b, a, b * b),
    "at_least": lambda a, b: where(a <= b, a, b * b),
    "where": lambda a, b: where(a < 0.1, 1.0, 2.0) * b,
    "stop_gradient": lambda a, b: stop_gradient(a * b) * a,
    "powers": lambda a, b: a * a * a * b * b,
}


def test_every_operation_is_tried():
    assert {*PARTIALS, *FUNCTIONS} <= {*EXPRESSIONS}


def one(expression):
    """A cell of one expression."""

    @declare(gates={"a": "xh", "b": "xh"}, states=("h",))
    def cell(a, b):
        return expression(a, b)

    return cell


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_each_operation(name):
    """Its value, gradient, tangent and curvature against autograd's, on tensors; its value on numbers."""
    expression = EXPRESSIONS[name]
    code, given = one(expression).derived(), values(["a_pre", "b_pre", "dh", "a_pre_t", "b_pre_t"])
    a, b = (given[k].clone().requires_grad_() for k in ("a_pre", "b_pre"))
    want = expression(a, b)
    found = code.forward(given)
    assert torch.equal(found["h"], want)
    dh = given["dh"].clone().requires_grad_()
    grads = torch.autograd.grad(want, (a, b), dh, create_graph=True, **LOOSE)
    got = code.backward({**given, **found})
    for k, gradient in zip(("da_pre", "db_pre"), grads):
        assert error(got.get(k, torch.zeros(64, dtype=torch.double)), gradient) < 1e-14
    along = given["a_pre_t"], given["b_pre_t"]
    products = sum((g * t).sum() for g, t in zip(grads, along))
    second = torch.autograd.grad(products, (a, b, dh), **LOOSE)
    bent, moved = code.curvature({**given}), code.tangent({**given})
    for k, change in zip(("da_pre_t", "db_pre_t"), second):
        assert error(bent.get(k, torch.zeros(64, dtype=torch.double)), change) < 1e-14
    assert error(moved["h_t"], second[2]) < 1e-14
    for k in range(8):
        number = expression(a[k].item(), b[k].item())
        assert math.isclose(number, want[k].item(), rel_tol=1e-14, abs_tol=1e-15)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_nan_and_infinity_in_a_gradient(name):
    """Wherever autograd has NaN in a gradient, so does what is derived."""
    expression, special = EXPRESSIONS[name], torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.5], dtype=torch.double)
    grid = torch.cartesian_prod(special, special)
    a, b = (grid[:, k].clone().requires_grad_() for k in (0, 1))
    want, code = expression(a, b), one(expression).derived()
    given = {"a_pre": grid[:, 0], "b_pre": grid[:, 1], "dh": torch.ones(len(grid), dtype=torch.double)}
    found = code.forward(given)
    assert torch.equal(found["h"].isnan(), want.isnan())
    got = code.backward({**given, **found})
    nan = grid.isnan().any(-1)
    for k, gradient in zip(("da_pre", "db_pre"), torch.autograd.grad(want.sum(), (a, b), **LOOSE)):
        ours = got.get(k, torch.zeros_like(gradient))
        assert ours.isnan()[gradient.isnan() & nan].all()
        finite = ~nan & gradient.isfinite()  # of two infinities autograd's NaN may be a number here
        assert error(ours[finite], gradient[finite]) < 1e-15


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_as_tensors(name):
    function, special = FUNCTIONS[name], (math.nan, math.inf, -math.inf, -0.75, 0.0, 800.0, -800.0)
    for x in special:
        args = {"maximum": (x, 0.5), "where": (x > 0.5, x, 0.25)}.get(name, (x,))
        tensors = [torch.tensor(a, dtype=torch.bool if isinstance(a, bool) else torch.double) for a in args]
        got, want = function(*args), function(*tensors).item()
        assert math.isclose(got, want, rel_tol=1e-14) or (math.isnan(got) and math.isnan(want))


def test_ties_are_torchs():
    code = one(lambda a, b: maximum(a, b)).derived()
    given = {"a_pre": torch.ones(1), "b_pre": torch.ones(1), "dh": torch.ones(1)}
    got = code.backward({**given, **code.forward(given)})
    assert got["da_pre"].item() == got["db_pre"].item() == 0.5
    code = one(lambda a, b: relu(a) * b).derived()
    given = {"a_pre": torch.zeros(1), "b_pre": torch.ones(1), "dh": torch.ones(1)}
    assert code.backward({**given, **code.forward(given)})["da_pre"].item() == 0.0


def test_the_jacobian_is_tangent_and_gradient():
    for cell in cells.CELLS:
        derived = cell.derived()
        given = values({**derived.tangent.arguments, **derived.backward.arguments})
        given |= derived.forward(given)
        slopes, moved, gradients = (code(given) for code in (derived.jacobian, derived.tangent, derived.backward))
        for state in cell.states:
            want = sum(slopes.get(f"{state}_by_{a}", 0) * given.get(f"{a}_t", 0) for a in cell.arguments.values())
            assert error(moved[f"{state}_t"], want) < 1e-13
        for name, got in gradients.items():
            want = sum(slopes.get(f"{state}_by_{name[1:]}", 0) * given[f"d{state}"] for state in cell.states)
            assert error(got, want) < 1e-13


def test_the_stabilizer_cancels():
    """No gradient of the sLSTM's output passes by way of m: held fixed, it gives the same."""
    from fastlstm.cells.library import slstm
    from tests.cells.functions import run
    from tests.cells.layers import Case

    @declare(gates=slstm.gates, states=slstm.states)
    def fixed(z, i, f, o, c, n, m):
        z, o, f_log = tanh(z), sigmoid(o), log_sigmoid(f) + m
        m = stop_gradient(maximum(f_log, i))
        i, f = exp(i - m), exp(f_log - m)
        c, n = f * c + i * z, f * n + i
        return o * c / n, c, n, m

    gradients = []
    for cell in (slstm, fixed):
        case = Case(cell, zeros=True)
        operands, wanted = case.with_gradients()
        gradients.append(torch.autograd.grad((run(case.on(operands))[0] * 3).sin().sum(), wanted))
    assert max(map(error, *gradients)) < 1e-12
