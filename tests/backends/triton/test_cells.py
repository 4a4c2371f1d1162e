"""Every cell in both kinds of Triton kernels, against the reference in float64."""

import warnings

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.backends import dispatch
from fastlstm.backends.base import Gradients, Layer, held_steps
from fastlstm.backends.triton import device as gpu
from fastlstm.cells import gru_reset_before
from fastlstm.layers.functional import run_cell
from fastlstm.plan_cache import Plans
from tests.backends.triton.shared import BOUNDS, DEVICE, STEPWISE, backend, check, converted, on_device, results, tiles
from tests.cells.layers import directions, error, every_cell, gru_decay, masks, of_both, of_products
from tests.helpers.layers import Case, flat, stacked
from tests.helpers.rnn import of_heads

pytestmark = pytest.mark.usefixtures("poisoned")
WITH_MEANS = (cells.dreamer_gru, cells.layer_norm_lstm)


@pytest.mark.sampled(17)
@directions
@masks
@pytest.mark.parametrize("kind", BOUNDS)
@every_cell
def test_outputs_and_gradients(cell, kind, masked, reverse, kernels):
    # with this seed no two arguments of a maximum are equal up to the rounding of 16 bits: there its gradient jumps
    case = Case(cell, T=4, B=9, I=40 if reverse else 5, H=20, reverse=reverse, masked=masked, seed=4)
    check(case.layer, case.grads, kind)


@pytest.mark.sampled(11)
@masks
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize(
    ("cell", "H", "heads"),
    [
        *((cell, *size) for cell in WITH_MEANS for size in ((20, 1), (64, 1), (64, 2))),
        *((cell, *size) for cell in (of_heads, gru_reset_before, of_products) for size in ((20, 1), (60, 3), (64, 2))),
        *((cell, *size) for cell in (cells.lstm, gru_decay) for size in ((32, 2), (60, 3), (128, 4))),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_means_products_and_heads(cell, H, heads, kind, masked):
    case = Case(cell, T=3, B=9, I=40 if masked else 5, H=H, reverse=masked, masked=masked, heads=heads)
    check(case.layer, case.grads, kind)


def test_large_heads(monkeypatch):
    monkeypatch.setattr(tiles, "choose", lambda *_: STEPWISE)
    case = Case(cells.gru, T=2, B=5, H=128, masked=True, heads=2)
    check(case.layer, case.grads, "tf32")


@pytest.mark.parametrize("cell", [gru_decay, cells.slstm], ids=lambda cell: cell.name)
def test_a_stack_of_layers(cell, kernels):
    check_stack(cell, 1)


@pytest.mark.parametrize("cell", [gru_decay, cells.dreamer_gru], ids=lambda cell: cell.name)
def test_a_stack_of_layers_with_heads(cell):
    check_stack(cell, 2)


def check_stack(cell, heads):
    options = {"T": 2, "B": 4, "I": 5, "H": 20, "masked": True, "bias": False, "heads": heads}
    check(*stacked([Case(cell, **options, seed=seed) for seed in (1, 2)]), "ieee")


@pytest.mark.sampled(3)
@directions
@pytest.mark.parametrize("cell", [gru_decay, cells.slstm, cells.lstm], ids=lambda cell: cell.name)
def test_nan_in_the_padding_reaches_nothing(cell, reverse, kernels):
    case = Case(cell, T=3, B=5, H=20, masked=True, reverse=reverse)
    clean, grads = on_device(case.layer.to(torch.float32)), converted(case.grads, torch.float32)
    x, *inputs = (a.masked_fill(held_steps(clean), float("nan")) for a in (clean.x, *clean.inputs))
    found = [results(layer, grads, "ieee") for layer in (clean, clean._replace(x=x, inputs=tuple(inputs)))]
    for a, b in zip(*([*run, *gradients] for run, gradients in found), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("cell", WITH_MEANS, ids=lambda cell: cell.name)
def test_bits_do_not_depend_on_the_rows_beside(cell):
    layer, row = on_device(Case(cell, T=3, B=5, H=20).layer.to(torch.float32)), torch.tensor([2], device=DEVICE)
    x = torch.full_like(layer.x, 1e3).index_copy(1, row, layer.x.index_select(1, row))
    for a, b in zip(*(flat(backend.forward(each, False, "ieee")) for each in (layer, layer._replace(x=x)))):
        assert torch.equal(a[..., 2, :], b[..., 2, :])
        assert not torch.equal(a, b)


@pytest.mark.parametrize("stepwise", [False, True])
def test_infinity_does_not_cross_from_one_head_to_another(stepwise, monkeypatch):
    if stepwise:
        monkeypatch.setattr(tiles, "choose", lambda *_: STEPWISE)
    case, results = Case(cells.gru, T=2, B=3, H=64, heads=2), []
    layer, grads = on_device(case.layer.to(torch.float32)), converted(case.grads, torch.float32)
    for value in (None, float("inf"), float("nan")):
        if value is not None:
            weight_hh = layer.weights[1].clone()
            weight_hh[3], layer.states[0][:, 5] = value, value  # both of the first head
            layer = layer._replace(weights=(layer.weights[0], weight_hh, *layer.weights[2:]))
        run = backend.forward(layer, True, "ieee")
        gradients = backend.backward(grads, layer, run, case.needs, "ieee")
        results.append([*flat(run), gradients.states[0], gradients.weights[1].view(3, 64, 32).transpose(1, 2)])
    for clean, *others in zip(*results):
        for other in others:
            assert torch.equal(clean[..., 32:], other[..., 32:])


def test_layers_that_no_kernel_runs(monkeypatch):
    """By name they raise, and auto takes plain PyTorch, with a warning."""
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    for layer, reason in (
        (Case(cells.dreamer_gru, H=140).layer, "no means over 140 units, since one program cannot hold their weights"),
        (Case(of_heads, H=280, heads=2).layer, "no means over 140 units"),
        (
            Case(gru_reset_before, H=70).layer,
            "products of values of a step up to 64 units, .*got gru_reset_before .* 70 units",
        ),
        (Case(of_both, H=20, heads=2).layer, "no means over a row beside means over its heads"),
        (Case(cells.lstm, H=300, heads=2).layer, "needs large heads of a multiple of 32 units, got 150"),
    ):
        layer = layer.to(torch.float32)
        options = {"cell": layer.cell, "masked": False, "inner_states": False, "layer": layer}
        with pytest.raises(RuntimeError, match=reason):
            dispatch.choose("triton-ieee", DEVICE, torch.float32, **options)
        with pytest.raises(RuntimeError, match=reason):
            backend.forward(layer, True, "ieee")
        monkeypatch.setattr(dispatch, "_warned", set())
        monkeypatch.setattr(backend, "resolve_precision", lambda *_: "ieee")
        with pytest.warns(
            RuntimeWarning, match=f"in plain PyTorch, since no backend here has a kernel for it: .*{reason}"
        ):
            assert dispatch.choose("auto", torch.device("cuda"), torch.float32, **options) == "reference"
    headed = Case(cells.lstm, H=256, heads=2).layer.to(torch.float32)
    options |= {"cell": cells.lstm, "layer": headed}
    assert dispatch.choose("auto", torch.device("cuda"), torch.float32, **options) == "triton"


@pytest.mark.parametrize("kind", ["ieee", "tf32"])
def test_outputs_of_any_size_are_multiplied(kind, kernels):
    """Packed weights are multiplied in fp16, which ends at 65504: h is scaled where the cell does not bound it."""
    case = Case(cells.elman_relu, T=3, B=3, H=20)
    layer = case.layer._replace(x=case.layer.x * 1e5, states=(case.layer.states[0] * 1e5,))
    check(layer, case.grads, kind, Gradients(True, (False, False, True, True), (True,)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("cell", [cell for cell in cells.CELLS if not cell.inputs], ids=lambda cell: cell.name)
def test_a_single_step(cell, kernels):
    """By a plan, with first and second derivatives of the states after the step."""
    case, found = Case(cell, T=1, B=3, I=5, H=20), []
    for name, dtype in (("triton-ieee", torch.float32), ("reference", torch.double)):
        given = [None if a is None else a.to(DEVICE, torch.float32) for a in case.layer.tensors]
        given = [None if a is None else a.to(dtype).requires_grad_() for a in given]
        layer, wanted = Layer.of(cell, given, False), [a for a in given if a is not None]
        states = run_cell(cell, layer.x[0], layer.states, layer.weights, name, Plans())
        loss = sum((a * d.to(a)).sum() for a, d in zip(states, case.grads.last))
        first = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
        again = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(a.square().sum() for a in again), wanted, materialize_grads=True)
        found.append((*states, *first, *second))
    for got, want in zip(*found, strict=True):
        assert error(got.double(), want) < BOUNDS["ieee"][2]


@cells.cell(gates={"f": "xh", "c": "xh"}, states=("h",), params=("w",), inputs=("gap",))
def leaky(f, c, h, w, gap):
    return h + cells.sigmoid(f) * (cells.tanh(c) - h) * cells.exp(-cells.relu(w * gap))


@pytest.mark.parametrize(
    ("cell", "H", "options"),
    [(leaky, 20, {}), (cells.lstm, 64, {"heads": 2}), (cells.gru, 20, {"bidirectional": True})],
    ids=["own cell", "heads", "directions"],
)
def test_modules(cell, H, options, kernels):
    """In the first call and the second, which follows a plan."""
    results = []
    for name in ("triton-ieee", "reference"):
        torch.manual_seed(0)
        rnn = fastlstm.RNN(cell, 6, H, backend=name, device=DEVICE, **options)
        x, inputs = (
            torch.randn(2, 3, 6, device=DEVICE),
            {name: torch.rand(2, 3, H, device=DEVICE) for name in cell.inputs},
        )
        shape = 1 + rnn.bidirectional, 3, H
        states = tuple(torch.randn(shape, device=DEVICE) for _ in cell.states)
        wanted = [a.requires_grad_() for a in (*states, *inputs.values())] + [*rnn.parameters()]
        for _ in range(2):
            output, last = rnn(x, states, inputs or None)
            loss = output.sin().sum() + sum(a.cos().sum() for a in last)
            results.append([output, *last, *torch.autograd.grad(loss, wanted)])
    for got in results[:2]:
        assert max(map(error, got, results[-1])) < BOUNDS["ieee"][2]


@cells.cell(gates=dict.fromkeys("abcdefgi", "xh"), states=("h",))
def eight_gates(a, b, c, d, e, f, g, i):
    return cells.tanh(a + b * c + d) * cells.sigmoid(e + f + g * i)


@pytest.mark.parametrize("kind", BOUNDS)
def test_more_gates_than_a_product_can_join(kind, kernels):
    case = Case(eight_gates, T=2, B=9, I=5, H=20)
    check(case.layer, case.grads, kind)


@every_cell
def test_auto_takes_the_kernels_for_every_cell(cell, monkeypatch):
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    options = {"cell": cell, "masked": True, "inner_states": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("auto", torch.device("cuda"), torch.float32, **options) == "triton"
