"""What torch's own tests ask of its recurrent modules on a CPU holds under `fastlstm.patch_operators` too.

Those tests are written anew here, by the property that each of them is about. Left out are those of GPUs, of parameters
and construction, and of cells, which the operators have no part in.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastlstm
from tests.helpers.contract import LAYERS
from tests.helpers.modules import flat
from tests.helpers.tolerances import close

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def patched():
    with fastlstm.patch_operators():
        yield


def layer(name, *sizes, **options):
    kind, more = LAYERS[name]
    return kind(*sizes, **more, **options)


def states_of(module, *sizes, **options):
    """Random states of (layers times directions, *sizes, H), as the module takes them."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(count, *sizes, module.proj_size or module.hidden_size, **options)
    return (h, torch.randn(count, *sizes, module.hidden_size, **options)) if isinstance(module, nn.LSTM) else h


@each_layer
def test_no_states_are_zeros(name):
    module, x = layer(name, 30, 20, 2), torch.randn(10, 32, 30)
    zeros = torch.zeros(2, 32, 20)
    given = module(x, (zeros, zeros) if name == "LSTM" else zeros)
    close(flat(module(x)), flat(given), "values")


@pytest.mark.sampled(3)
@each_layer
@pytest.mark.parametrize(
    ("x_size", "state_size"),
    [
        ((6, 7, 3), (2, 4, 5)),
        ((6, 4, 7), (2, 4, 5)),
        ((6, 4, 3), (7, 4, 5)),
        ((6, 4, 3), (2, 7, 5)),
        ((6, 4, 3), (2, 4, 7)),
    ],
    ids=["rows", "features", "layers of states", "rows of states", "features of states"],
)
def test_sizes_that_do_not_fit_raise(name, x_size, state_size):
    module, x = layer(name, 3, 5, 2), torch.randn(x_size)
    state, fitting = torch.randn(state_size), torch.randn(2, 4, 5)
    for hx in [(state, fitting), (fitting, state)] if name == "LSTM" else [state]:
        with pytest.raises(RuntimeError, match=r"Expected hidden|must be equal to input_size"):
            module(x, hx)


@each_layer
@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_steps_raise(name, bidirectional):
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        layer(name, 5, 6, bidirectional=bidirectional).double()(torch.ones(0, 10, 5, dtype=torch.float64))


@each_layer
def test_no_rows(name):
    module = layer(name, 3, 4)
    output = module(torch.zeros(5, 0, 3))[0]
    assert output.shape == (5, 0, 4)
    output.sum().backward()


@each_layer
def test_a_graph_serves_twice(name):
    """The gradients of a second backward pass through one graph are those of the first."""
    module, x = layer(name, 10, 20, 2), torch.randn(6, 3, 10, requires_grad=True)
    output = module(x)[0].cos().sum()
    first = torch.autograd.grad(output, [x, *module.parameters()], retain_graph=True)
    second = torch.autograd.grad(output, [x, *module.parameters()])
    assert all(map(torch.equal, first, second))


@each_layer
@pytest.mark.parametrize("bias", [True, False])
def test_derivatives(name, bias):
    module = layer(name, 4, 4, bias=bias, dtype=torch.float64)
    x = torch.rand(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def run(x):
        return tuple(flat(module(x)))

    assert gradcheck(run, x)
    assert gradgradcheck(run, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_layer
def test_gradients_of_all_results(name, dtype):
    """A module's results, and the gradients of its input, states and parameters, are those of float64."""
    module = layer(name, 10, 6, 2, dtype=dtype)
    exact, x = copy.deepcopy(module).double(), torch.randn(7, 6, 10, dtype=dtype)
    hx = states_of(module, 6, dtype=dtype)

    def run(module, dtype):
        leaves = [a.to(dtype).requires_grad_() for a in [x, *flat(hx)]]
        outputs = flat(module(leaves[0], tuple(leaves[1:]) if name == "LSTM" else leaves[1]))
        directions = [torch.linspace(-1, 1, a.numel(), dtype=dtype).view_as(a) for a in outputs]
        return [*outputs, *torch.autograd.grad(outputs, [*leaves, *module.parameters()], directions)]

    close(run(module, dtype), run(exact, torch.float64), "gradients")


def test_second_derivatives_with_and_without_one_dnn():
    module, x = nn.LSTM(3, 3, 20, batch_first=True), torch.rand(10, 12, 3, requires_grad=True)

    def twice():
        output = module(x)[0]
        (first,) = torch.autograd.grad(output, x, torch.ones_like(output), create_graph=True)
        return first, torch.autograd.grad(first.sum(), x)[0]

    with torch.backends.mkldnn.flags(enabled=False):
        want = twice()
    for a, b in zip(twice(), want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)  # as torch's own test, whose values are small


@each_layer
def test_an_input_alone_may_want_a_gradient(name):
    module, x = layer(name, 2, 3), torch.randn(1, 1, 2, requires_grad=True)
    for parameter in module.parameters():
        parameter.requires_grad = False
    module(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.sampled(7)
@pytest.mark.parametrize("lengths", [[5, 4, 2, 1], [2, 5, 1, 4], [3, 3, 3, 3], [1], [5]])
@pytest.mark.parametrize("has_states", [False, True])
@pytest.mark.parametrize(("name", "options"), [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {})])
def test_packed_rows_are_as_if_alone(name, options, lengths, has_states):
    module = layer(name, 3, 4, 2, bidirectional=True, dtype=torch.float64, **options)
    x = torch.randn(max(lengths), len(lengths), 3, dtype=torch.float64, requires_grad=True)
    hx = states_of(module, len(lengths), dtype=torch.float64) if has_states else None
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    output, last = module(packed, hx)
    padded, _ = pad_packed_sequence(output, total_length=max(lengths))
    parts = []
    for k, length in enumerate(lengths):
        own = None if hx is None else tuple(a[:, k : k + 1] for a in flat(hx))
        alone, ends = module(x[:length, k : k + 1], own if name == "LSTM" or own is None else own[0])
        close(padded[:length, k : k + 1], alone, "values")
        close([a[:, k : k + 1] for a in flat(last)], flat(ends), "values")
        assert not padded[length:, k].any()
        parts.append(alone.cos().sum())
    want = torch.autograd.grad(sum(parts), [x, *module.parameters()])
    close(torch.autograd.grad(output.data.cos().sum(), [x, *module.parameters()]), want, "sums")


@pytest.mark.parametrize("p", [0.0, 0.276, 0.731, 1.0])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_stands_between_layers(p, training):
    """With weights of ones each unit of the second layer counts the units of the first that are kept."""
    module = nn.RNN(10, 1000, 2, bias=False, dropout=p, nonlinearity="relu").train(training)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1)
        output, h_n = module(torch.ones(1, 1, 10), torch.zeros(2, 1, 1000))
    value = output[0, 0, 0].item()
    assert (output == value).all()
    assert (h_n[0] == 10).all()
    assert (h_n[1] == value).all()
    if p == 0 or not training:
        assert value == 10000
    elif p == 1:
        assert value == 0
    else:
        assert abs(value * (1 - p) / 10 - round(value * (1 - p) / 10)) < 1e-2
        assert 8000 < value < 12000  # 14 standard deviations of a thousand draws


def test_dropout_that_changes():
    module, x = nn.RNN(100, 100, 2, nonlinearity="relu"), torch.rand(3, 2, 100)
    for p in (0, 0.5, 0, 0.7, 0.2, 1, 0.2, 0):
        module.dropout = p
        for training in (True, False):
            module.train(training)
            first, second = module(x)[0], module(x)[0]
            assert torch.equal(first, second) == (p in (0, 1) or not training)


@pytest.mark.parametrize("training", [True, False])
def test_copies_draw_anew(training):
    module, x = nn.GRU(20, 100, 2, dropout=0.3).train(training), torch.rand(3, 2, 20)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(module(x)[0], loaded(x)[0]) != training


@each_layer
def test_weights_without_and_with_norm(name):
    module, x = layer(name, 10, 6, 2), torch.randn(7, 6, 10)
    want = module(x)[0]
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(module, "weight_hh_l0")
    close(module(x)[0], want.double(), "values")
    close(nn.utils.remove_weight_norm(module, "weight_hh_l0")(x)[0], want.double(), "values")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", [{}, {"bidirectional": True}, {"bias": False}, {"batch_first": True, "num_layers": 3}])
def test_lstms_of_one_dnn(dtype, form):
    """In the types and forms that torch runs in oneDNN: training and inference, with and without states."""
    module = nn.LSTM(3, 8, **form).to(dtype)
    exact, x = copy.deepcopy(module).double(), torch.randn(5, 4, 3).to(dtype)
    hx = tuple(a.to(dtype) for a in states_of(module, 5 if module.batch_first else 4))
    for states in (None, hx):
        own = states if states is None else tuple(a.double() for a in states)
        with torch.no_grad():
            got, want = flat(module(x, states)), flat(exact(x.double(), own))
        trained = flat(module(x, states))
        bound = {torch.bfloat16: 5e-2, torch.float32: 1e-6}[dtype]  # values within 1, rounded in a few layers and steps
        for a, b, c in zip(got, want, trained):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=bound)
            torch.testing.assert_close(c.double(), b, rtol=0, atol=bound)
        torch.autograd.grad(trained[0].sum(), module.parameters())


INFOS = [info for info in module_db if info.module_cls in (nn.LSTM, nn.GRU, nn.RNN)]


@pytest.mark.parametrize("info", INFOS, ids=[info.module_cls.__name__ for info in INFOS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_and_errors_of_module_db(info, dtype):
    options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": True}
    for sample in info.module_inputs_func(info, **options):
        made, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*made.args, **{"dtype": dtype, **made.kwargs})
        got = flat(module(*given.args, **given.kwargs))
        fastlstm.unpatch_operators()
        want = flat(module(*given.args, **given.kwargs))
        fastlstm.patch_operators()
        close(got, want, "sums")
    for error in info.module_error_inputs_func(info, **options):
        made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
        if error.error_on == ModuleErrorEnum.FORWARD_ERROR:
            module = info.module_cls(*made.args, **{"dtype": dtype, **made.kwargs})
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*given.args, **given.kwargs)
