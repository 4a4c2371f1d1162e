"""What is derived against formulas by hand, autograd, and the bits of the LSTM as it was written by hand."""

import math

import pytest
import torch

from fastlstm import cells
from fastlstm.cells.derive import PARTIALS
from fastlstm.cells.emit import Function
from fastlstm.cells.functions import FUNCTIONS
from fastlstm.cells.graph import HEADS, Graph
from tests.cells.layers import MEANS, error, one

LOOSE = {"allow_unused": True, "materialize_grads": True}


def values(names, dtype=torch.double, count=64):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(count, generator=generator, dtype=torch.double).to(dtype) for name in names}


def forward_by_hand(i_pre, f_pre, g_pre, o_pre, c_prev, sigmoid, tanh):
    i, f, g, o = sigmoid(i_pre), sigmoid(f_pre), tanh(g_pre), sigmoid(o_pre)
    c = f * c_prev + i * g
    return o * tanh(c), c, i, f, g, o


def backward_by_hand(dh, dc, i, f, g, o, c_prev, tanh):
    tanh_c = tanh(f * c_prev + i * g)
    dc = dh * o * (1.0 - tanh_c * tanh_c) + dc
    di, df, dg, do = dc * g, dc * c_prev, dc * i, dh * tanh_c
    return di * i * (1.0 - i), df * f * (1.0 - f), dg * (1.0 - g * g), do * o * (1.0 - o), dc * f


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_lstm_has_the_bits_of_the_one_by_hand(dtype):
    given = values(["i", "f", "g", "o", "c", "dh", "dc"], dtype, 4096)
    forward, backward = cells.lstm.derived().forward, cells.lstm.derived().backward
    assert tuple(forward.arguments) == ("i_pre", "f_pre", "g_pre", "o_pre", "c_prev")
    assert tuple(forward.results) == ("h", "c", "i", "f", "g", "o")
    assert tuple(backward.arguments) == ("dh", "dc", "i", "f", "g", "o", "c_prev")
    assert tuple(backward.results) == ("di_pre", "df_pre", "dg_pre", "do_pre", "dc_prev")
    want = forward_by_hand(*(given[name] for name in "ifgoc"), torch.sigmoid, torch.tanh)
    got = forward(dict(zip(forward.arguments, (given[name] for name in "ifgoc"))))
    assert all(map(torch.equal, got.values(), want))
    gates = dict(zip("ifgo", want[2:]))
    expected = backward_by_hand(given["dh"], given["dc"], *gates.values(), given["c"], torch.tanh)
    found = backward({"dh": given["dh"], "dc": given["dc"], **gates, "c_prev": given["c"]})
    assert all(map(torch.equal, found.values(), expected))


def test_operations():
    """As many as by hand, or fewer."""
    graph = Graph()
    args = {name: graph.input(name) for name in ["dh", "dc", "i", "f", "g", "o", "c_prev"]}
    hand = Function("by hand", args, dict(enumerate(backward_by_hand(*args.values(), cells.tanh))))
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


EXPRESSIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a, b: -a * b,
    "constants": lambda a, b: (2.0 - a) / 3 + 1 / b - 0.5 * a,
    **{
        name: lambda a, b, f=FUNCTIONS[name]: f(a) * b
        for name in ("sigmoid", "tanh", "relu", "exp", "log_sigmoid", "square", "softplus")
    },
    **{name: lambda a, b, f=FUNCTIONS[name]: f(0.5 + a * a) * b for name in ("sqrt", "rsqrt", "log")},
    "maximum": lambda a, b: cells.maximum(a, b) * a,
    "maximum_with_a_number": lambda a, b: cells.maximum(0.5, a) * b,
    "greater": lambda a, b: cells.where(a > b, a, b * b),
    "at_least": lambda a, b: cells.where(a <= b, a, b * b),
    "where": lambda a, b: cells.where(a < 0.1, 1.0, 2.0) * b,
    "stop_gradient": lambda a, b: cells.stop_gradient(a * b) * a,
    "surrogate": lambda a, b: cells.surrogate(a, 1 / (1 + b * b)) * b,
    "powers": lambda a, b: a**3 * b * b,
    "abs": lambda a, b: abs(a) * b,
    "minimum": lambda a, b: cells.minimum(a, b) * a,
    "clamp": lambda a, b: cells.clamp(a, -0.5, b),
    "hard_sigmoid": lambda a, b: cells.hard_sigmoid(2 * a) * b,
}
ALL = EXPRESSIONS | MEANS


def test_every_operation_is_tried():
    assert {*PARTIALS, *FUNCTIONS} - {"product"} <= {*ALL}


@pytest.mark.parametrize("name", ALL)
def test_each_operation(name):
    """Its value and gradient, and autograd's gradient of that, against autograd's, on tensors; its value on numbers."""
    expression = ALL[name]
    code, given = one(expression).derived(), values(["a_pre", "b_pre", "dh", "a_pre_t", "b_pre_t"])
    given |= {HEADS: 1}
    a, b = (given[k].clone().requires_grad_() for k in ("a_pre", "b_pre"))
    want = expression(a, b)
    dh = given["dh"].clone().requires_grad_()
    operands = {**given, "a_pre": a, "b_pre": b, "dh": dh}
    found = code.forward(operands)
    assert torch.equal(found["h"], want) if name in EXPRESSIONS else error(found["h"], want) < 1e-14
    grads = torch.autograd.grad(want, (a, b), dh, create_graph=True, **LOOSE)
    got = code.backward({**operands, **found})
    got = [got.get(k, torch.zeros(64, dtype=torch.double)) for k in ("da_pre", "db_pre")]
    along, second = (given["a_pre_t"], given["b_pre_t"]), []
    for gradients in (grads, got):
        products = sum((g * t).sum() for g, t in zip(gradients, along))
        second.append(torch.autograd.grad(products, (a, b, dh), **LOOSE))
    assert max(map(error, got, grads)) < 1e-14
    assert max(map(error, *second)) < 1e-14
    for k in range(8 if name in EXPRESSIONS else 0):  # a number is its own mean
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


SPECIAL = (math.nan, math.inf, -math.inf, -0.75, 0.0, 0.5, 3.0, -3.0, 800.0, -800.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_as_tensors(name):
    function = FUNCTIONS[name]
    for x in SPECIAL:
        others = {"maximum": (x, 0.5), "minimum": (x, 0.5), "clamp": (x, 0.5), "where": (x > 0.5, x, 0.25)}
        others["surrogate"] = x, 0.25
        args = others.get(name, (x,))
        tensors = [torch.tensor(a, dtype=torch.bool if isinstance(a, bool) else torch.double) for a in args]
        got, want = function(*args), function(*tensors).item()
        assert math.isclose(got, want, rel_tol=1e-14) or (math.isnan(got) and math.isnan(want))


def test_ties_are_torchs():
    code = one(lambda a, b: cells.maximum(a, b)).derived()
    given = {"a_pre": torch.ones(1), "b_pre": torch.ones(1), "dh": torch.ones(1)}
    got = code.backward({**given, **code.forward(given)})
    assert got["da_pre"].item() == got["db_pre"].item() == 0.5
    code = one(lambda a, b: cells.relu(a) * b).derived()
    given = {"a_pre": torch.zeros(1), "b_pre": torch.ones(1), "dh": torch.ones(1)}
    assert code.backward({**given, **code.forward(given)})["da_pre"].item() == 0.0


def test_clamp_needs_a_limit():
    with pytest.raises(ValueError, match="clamp needs min or max, got None for both"):
        cells.clamp(torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("H", [1, 7, 650])
def test_norms_are_torchs(dtype, H):
    """Of one value, and of several as of one tensor with all of them side by side; far from zero, too."""
    bound = 1e-12 if dtype is torch.float64 else 1e-4  # rounding to a hundred times as much as what is left
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(3, H, generator=generator, dtype=dtype) + 100.0 for _ in range(3)]
    weights, biases = ([torch.randn(H, generator=generator, dtype=dtype) for _ in values] for _ in "wb")
    functional, together = torch.nn.functional, torch.cat(values, -1)
    joint = {"normalized_shape": (3 * H,), "weight": torch.cat(weights)}
    for ours, theirs in (
        (cells.layer_norm(values[0]), functional.layer_norm(values[0], (H,))),
        (cells.layer_norm(values[0], weight=weights[0], bias=biases[0], eps=0.1),
         functional.layer_norm(values[0], (H,), weights[0], biases[0], 0.1)),
        (torch.cat(cells.layer_norm(*values, weight=weights, bias=biases), -1),
         functional.layer_norm(together, **joint, bias=torch.cat(biases))),
        (torch.cat(cells.layer_norm(*values, bias=2.0), -1), functional.layer_norm(together, (3 * H,)) + 2.0),
        (cells.rms_norm(values[0]), functional.rms_norm(values[0], (H,), eps=torch.finfo(torch.float32).eps)),
        (torch.cat(cells.rms_norm(*values, weight=tuple(weights), eps=0.1), -1),
         functional.rms_norm(together, **joint, eps=0.1)),
    ):  # fmt: skip
        assert error(ours, theirs) < bound
