"""Models of an ensemble give what each of them gives alone, bit by bit."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parametrizations

import fastlstm
from fastlstm.backends import dispatch
from tests.helpers.modules import flat
from tests.helpers.tolerances import close, equal

M, T, B, I, H = 3, 7, 4, 5, 6
MODULES = {
    "LSTM": lambda **k: fastlstm.LSTM(I, H, **k),
    "GRU": lambda **k: fastlstm.GRU(I, H, 2, bidirectional=True, batch_first=True, **k),
    "Elman": lambda **k: fastlstm.Elman(I, H, bias=False, **k),
    "heads": lambda **k: fastlstm.RNN(fastlstm.cells.slstm, I, H, heads=2, **k),
    "products": lambda **k: fastlstm.RNN(fastlstm.cells.gru_reset_before, I, H, heads=2, **k),
    "one step": lambda **k: fastlstm.LSTM(I, H, **k),
}


def gradients(output, states, of):
    loss = output.pow(2).sum() + sum(a.sin().sum() for a in flat(states))
    return torch.autograd.grad(loss, of, create_graph=True)


def drawn(name, dtype=torch.float32, backend=None):
    """Modules, an input and states that need gradients."""
    torch.manual_seed(0)
    modules = [MODULES[name](dtype=dtype, backend=backend) for _ in range(M)]
    first = modules[0]
    steps = 1 if name == "one step" else T
    x = torch.randn(M, *((B, steps) if first.batch_first else (steps, B)), I, dtype=dtype, requires_grad=True)
    rows = first.num_layers * (1 + first.bidirectional)
    states = [torch.randn(M, rows, B, H, dtype=dtype, requires_grad=True) for _ in first._cell.states]
    return modules, x, states[0] if first._has_bare_state else (*states,)


def of_model(states, k):
    return None if states is None else states[k] if isinstance(states, torch.Tensor) else tuple(a[k] for a in states)


@pytest.mark.parametrize("from_zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_the_bits_of_each_model_alone(name, dtype, from_zeros):
    modules, x, hx = drawn(name, dtype)
    ensemble, hx = fastlstm.Ensemble(modules), None if from_zeros else hx
    for _ in range(2):  # with the second call the plan is there
        output, states = ensemble(x, hx)
        given = [x, *(flat(hx) if hx is not None else ()), *ensemble.parameters()]
        found = gradients(output, states, given)
        with torch.no_grad():
            assert torch.equal(ensemble(x, hx)[0], output)
        for k, module in enumerate(modules):
            y, last = module(x[k], of_model(hx, k))
            assert torch.equal(output[k], y)
            equal([a[k] for a in flat(states)], flat(last))
            count = len(given) - len(list(module.parameters()))
            alone = gradients(y, last, [*given[:count], *module.parameters()])
            assert all(torch.equal(a[k], b[k] if n < count else b) for n, (a, b) in enumerate(zip(found, alone)))


@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(autocast):
    modules, x, hx = drawn("LSTM", torch.float32 if autocast else torch.bfloat16)
    ensemble = fastlstm.Ensemble(modules)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(2):
            output, states = ensemble(x, hx)
            alone = [module(x[k], of_model(hx, k)) for k, module in enumerate(modules)]
    assert output.dtype == torch.bfloat16
    found = gradients(output.float(), [a.float() for a in states], [x, *ensemble.parameters()])
    for k, (y, last) in enumerate(alone):
        close([output[k], *(a[k] for a in states)], [y, *last], "cast")
        of_model_k = gradients(y.float(), [a.float() for a in last], [x, *modules[k].parameters()])
        for a, b in zip(found, of_model_k):
            b = b[k] if b.shape == x.shape else b
            assert (a[k] - b).abs().max() <= 3e-2 * b.abs().max()  # of sums of products of 8 bits


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_other_backends(backend):
    if (reason := dispatch.module(backend).supports(torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    modules, x, hx = drawn("LSTM", backend=backend)
    ensemble = fastlstm.Ensemble(modules)
    output, states = ensemble(x, hx)
    found = gradients(output, states, [x, *ensemble.parameters()])
    for k, module in enumerate(modules):
        y, last = module(x[k], of_model(hx, k))
        close([output[k], *(a[k] for a in states)], [y, *last], "values")
        alone = gradients(y, last, [x, *module.parameters()])
        close([a[k] for a in found], [alone[0][k], *alone[1:]], "gradients")


def test_second_derivatives_and_vmap():
    modules, x, _ = drawn("LSTM", torch.float64)
    ensemble = fastlstm.Ensemble(modules)
    parameters, _ = stack_module_state(modules)
    assert list(dict(ensemble.stacked.named_parameters())) == list(parameters)
    together = vmap(lambda p, x: functional_call(modules[0], p, (x,)))(parameters, x)
    results = []
    for (output, states), of in ((ensemble(x), ensemble.parameters()), (together, parameters.values())):
        of = [x, *of]
        first = gradients(output, states, of)
        results.append([output, *states, *first, *torch.autograd.grad(sum(g.pow(2).sum() for g in first), of)])
    close(*results, "derivatives")


def test_all_models_read_one_input():
    modules, x, _ = drawn("LSTM")
    ensemble = fastlstm.Ensemble(modules)
    shared = x[0].detach().requires_grad_()
    output, _ = ensemble(shared)
    assert torch.equal(output, ensemble(shared.expand(M, -1, -1, -1))[0])
    (gradient,) = torch.autograd.grad(output.sum(), shared)
    close(gradient, sum(torch.autograd.grad(m(shared)[0].sum(), shared)[0] for m in modules), "gradients")


def test_trained_and_unstacked():
    modules, x, _ = drawn("GRU")
    ensemble, alone = fastlstm.Ensemble(iter(modules)), copy.deepcopy(modules)
    for module in (ensemble, *alone):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        inputs = x if module is ensemble else x[alone.index(module)]
        module(inputs)[0].pow(2).sum().backward()
        optimizer.step()
    again = fastlstm.Ensemble(modules)
    again.load_state_dict(ensemble.state_dict())
    assert len(again) == M
    for got, expected, before in zip(again.unstack(), alone, modules, strict=True):
        assert type(got) is fastlstm.GRU
        assert got(x[0])[0].shape == expected(x[0])[0].shape
        for a, b, c in zip(got.parameters(), expected.parameters(), before.parameters(), strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, c)


def test_dropout_draws_in_training_alone():
    ensemble = fastlstm.Ensemble(fastlstm.LSTM(I, H, 2, dropout=0.5) for _ in range(M))
    x = torch.randn(M, T, B, I)
    assert not torch.equal(ensemble(x)[0], ensemble(x)[0])
    ensemble.eval()
    assert torch.equal(ensemble(x)[0], ensemble(x)[0])


lstm = fastlstm.LSTM(I, H)


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        ([], ValueError, "modules must be at least one, got none"),
        ([lstm, nn.LSTM(I, H)], TypeError, "modules must be fastlstm.LSTM, GRU, Elman or RNN modules, got LSTM"),
        (
            [lstm, fastlstm.LSTM(I, 9)],
            ValueError,
            r"of one kind, got options \S+LSTM\(5, 6\) and, at 1, \S+LSTM\(5, 9\)",
        ),
        ([lstm, fastlstm.LSTM(I, H, dtype=torch.float64)], ValueError, r"weight_ih_l0.dtype \S+32 and, at 1, \S+64"),
        ([lstm, fastlstm.LSTM(I, H).eval()], ValueError, "of one kind, got training True and, at 1, False"),
        ([fastlstm.Elman(I, H), fastlstm.Elman(I, H, nonlinearity="relu")], ValueError, "of one kind, got cell "),
        ([fastlstm.LSTM(I, H, proj_size=2)], ValueError, "must be without proj_size, recompute"),
        ([fastlstm.LSTM(I, H, recompute=True)], ValueError, "must be without proj_size, recompute"),
        ([fastlstm.LSTM(I, H, zoneout=0.1)], ValueError, "must be without proj_size, recompute"),
        ([parametrizations.weight_norm(fastlstm.LSTM(I, H), "weight_hh_l0")], TypeError, "got a parametrized "),
    ],
)
def test_modules_that_make_no_ensemble(modules, error, message):
    with pytest.raises(error, match=message):
        fastlstm.Ensemble(modules)


@fastlstm.cell(gates={"i": "xh"}, states=("h",), inputs=("a", "b"))
def with_inputs(i, h, a, b):
    return fastlstm.cells.tanh(i * a + b)


@fastlstm.cell(gates={}, states=("h",), params=("u",), inputs=("a",))
def without_x(h, u, a):
    return fastlstm.cells.tanh(u * h + a)


@pytest.mark.parametrize(("cell", "size", "got"), [(with_inputs, I, "with a, b$"), (without_x, 0, "with a$")])
def test_cells_whose_inputs_a_call_cannot_give(cell, size, got):
    message = f"^modules must have a cell without inputs, which a call cannot give, got {cell.name} {got}"
    with pytest.raises(ValueError, match=message):
        fastlstm.Ensemble(fastlstm.RNN(cell, size, H) for _ in range(M))


@pytest.mark.parametrize(("kind", "got"), [("tensor", "Tensor"), ("buffer", "Tensor"), ("absent", "NoneType")])
def test_weights_that_are_no_parameters(kind, got):
    modules = [fastlstm.LSTM(I, H) for _ in range(M)]
    weight = modules[1].weight_hh_l0.detach()
    del modules[1].weight_hh_l0
    if kind == "tensor":
        modules[1].weight_hh_l0 = weight
    elif kind == "buffer":
        modules[1].register_buffer("weight_hh_l0", weight)
    with pytest.raises(TypeError, match=rf"^modules must have torch.nn.Parameter as weight_hh_l0, got {got} at 1$"):
        fastlstm.Ensemble(modules)


def test_no_ensemble_of_what_is_stacked():
    ensemble = fastlstm.Ensemble(fastlstm.LSTM(I, H) for _ in range(M))
    with pytest.raises(TypeError, match=r"LSTM, GRU, Elman or RNN modules, got a stacked LSTM$"):
        fastlstm.Ensemble([ensemble.stacked])


@pytest.mark.parametrize(("option", "value"), [("recompute", True), ("zoneout", 0.1), ("recurrent_dropout", 0.1)])
def test_options_stay_refused(option, value):
    ensemble = fastlstm.Ensemble(fastlstm.LSTM(I, H) for _ in range(M))
    with pytest.raises(ValueError, match=f"{option} needs a single module, got {option}={value}"):
        setattr(ensemble.stacked, option, value)


@pytest.mark.parametrize("shape", [(B, I), (M + 1, T, B, I), (M, M, T, B, I)])
def test_inputs_of_a_wrong_shape(shape):
    ensemble = fastlstm.Ensemble(fastlstm.LSTM(I, H) for _ in range(M))
    with pytest.raises(ValueError, match="input must have 4 dimensions, the first M = 3, or 3, got"):
        ensemble(torch.randn(shape))
    with pytest.raises(TypeError, match="input must be a tensor, got NoneType"):
        ensemble(None)
    with pytest.raises(RuntimeError, match=r"input\.size"):
        ensemble(torch.randn(M, T, B, I + 1))


@pytest.mark.parametrize(
    ("hx", "error"),
    [
        (5, TypeError),
        ((torch.zeros(4, 1, 2, 4), None), TypeError),
        ((torch.zeros(4, 1, 2, 4),) * 3, RuntimeError),
        ((torch.zeros(2, 1, 4, 4),) * 2, ValueError),
        ((torch.zeros(1, 8, 4),) * 2, ValueError),
        ((torch.zeros(4, 1, 3, 4),) * 2, ValueError),
    ],
    ids=["a number", "None", "three", "two models of four rows", "without M", "three rows"],
)
def test_states_of_another_form(hx, error):
    ensemble = fastlstm.Ensemble(fastlstm.LSTM(3, 4) for _ in range(4))
    with pytest.raises(error, match=r"hx must (be|have)|expects two hidden states"):
        ensemble(torch.randn(4, 5, 2, 3), hx)


def test_one_module_does_not_stand_for_what_others_have():
    hooked, buffered = [fastlstm.LSTM(3, 4) for _ in range(2)], [fastlstm.GRU(3, 4) for _ in range(2)]
    hooked[0].register_forward_hook(lambda module, args, output: output)
    for module in buffered:
        module.register_buffer("scale", torch.ones(1))
    for modules, name in ((hooked, "forward_hooks"), (buffered, "scale")):
        with pytest.raises(ValueError, match=f"modules must have nothing beside their weights.*{name}"):
            fastlstm.Ensemble(modules)
    frozen = [fastlstm.LSTM(3, 4) for _ in range(2)]
    frozen[1].weight_hh_l0.requires_grad_(False)
    with pytest.raises(ValueError, match="modules must be of one kind"):
        fastlstm.Ensemble(frozen)
    for no_modules in (frozen[0], 5):
        with pytest.raises(TypeError, match="modules must be several modules, got one"):
            fastlstm.Ensemble(no_modules)


class Doubled(fastlstm.LSTM):
    def forward(self, x, hx=None):
        output, last = super().forward(x, hx)
        return 2 * output, last


def test_a_forward_of_a_subclass_is_refused():
    with pytest.raises(ValueError, match=r"nothing beside their weights.*\['forward'\] at 0"):
        fastlstm.Ensemble([Doubled(3, 4), Doubled(3, 4)])


def test_tied_weights_stay_tied():
    modules = [fastlstm.GRU(4, 4, 3, dtype=torch.float64) for _ in range(M)]
    for module in modules:
        module.weight_ih_l2 = module.weight_ih_l0
    ensemble, x = fastlstm.Ensemble(modules), torch.randn(T, B, 4, dtype=torch.float64)
    assert len(list(ensemble.parameters())) == len(list(modules[0].parameters()))
    ensemble(x)[0].sum().backward()
    for k, model in enumerate(ensemble.unstack()):
        assert model.weight_ih_l2 is model.weight_ih_l0
        model(x)[0].sum().backward()
        close(ensemble.stacked.weight_ih_l0.grad[k], model.weight_ih_l0.grad, "gradients")
    modules[1].weight_ih_l2 = modules[1].weight_ih_l1
    with pytest.raises(ValueError, match="modules must be of one kind"):
        fastlstm.Ensemble(modules)


def test_the_mode_is_that_of_the_modules():
    assert not fastlstm.Ensemble(fastlstm.LSTM(I, H).eval() for _ in range(M)).training


def test_what_takes_the_stack_for_a_single_module():
    """The stack has a class of torch's counterpart, which would read its weights as those of one module."""
    ensemble = fastlstm.Ensemble(fastlstm.LSTM(I, H) for _ in range(M))
    x = torch.randn(T, B, I)
    before = ensemble(x)[0]
    with pytest.warns(UserWarning, match="the modules of an Ensemble have no counterpart in torch and stay"):
        fastlstm.restore(ensemble)
    assert torch.equal(ensemble(x)[0], before)
    assert not isinstance(fastlstm.replace(ensemble, keep_type=True).stacked, nn.LSTM)
    with pytest.raises(TypeError, match="to_torch needs a single module"):
        ensemble.stacked.to_torch()
    with pytest.raises(ValueError, match="a stream needs a single module"):
        ensemble.stacked.stream(M)
    with pytest.raises(ValueError, match="x must have as many batch rows for each of the 3 stacked modules, got 4"):
        ensemble.stacked(x)
