"""What a call returns is the caller's: no gradient shares memory with another, no state of a batch is a view."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from tests.helpers.layers import needs_native

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
BACKENDS = ("numba", pytest.param("native", marks=needs_native), "reference")  # aten's gradients are torch's own
MODULES = {
    "a sequence": lambda **o: (fastlstm.LSTM(5, 7, **o), (4, 2, 5)),
    "layers and directions": lambda **o: (fastlstm.LSTM(5, 7, 2, bidirectional=True, **o), (4, 2, 5)),
    "a step": lambda **o: (fastlstm.LSTM(5, 7, **o), (1, 2, 5)),
    "a cell": lambda **o: (fastlstm.LSTMCell(5, 7, **o), (2, 5)),
}


def loss(module, x):
    """Of the output, or a cell's h."""
    return module(x)[0].square().sum()


def differentiate(module, x, **options):
    return torch.autograd.grad(loss(module, x), list(module.parameters()), **options)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_changed_in_place_changes_no_other(backend, kind, dtype, again):
    module, size = MODULES[kind](backend=backend, dtype=dtype)
    x = torch.randn(size, dtype=dtype)
    gradients = differentiate(module, x, create_graph=again)
    before = [a.detach().clone() for a in gradients]
    with torch.no_grad():
        for k, a in enumerate(gradients):
            a.mul_(k + 2)
    for k, (a, b) in enumerate(zip(gradients, before)):
        assert torch.equal(a, b * (k + 2))


class Gates(nn.Module):
    """A bias as four rows, of which the module takes a view."""

    def forward(self, rows):
        return rows.view(-1)

    def right_inverse(self, bias):
        return bias.view(4, -1).clone()


@pytest.mark.parametrize("kind", MODULES)
def test_gradients_of_biases_that_are_views_add_up(kind):
    """Autograd takes such gradients as they are; shared, each would be added to twice."""
    module, size = MODULES[kind]()
    x = torch.randn(size)
    for name in [name for name, _ in module.named_parameters() if "bias" in name]:
        parametrize.register_parametrization(module, name, Gates())
    once = differentiate(module, x)
    for times in (1, 2, 3):
        loss(module, x).backward()
        for a, b in zip(module.parameters(), once):
            torch.testing.assert_close(a.grad, times * b, rtol=1e-6, atol=1e-6)  # a rounding of each sum


CALLS = {
    "states": lambda m, x, s: m(x, s),
    "states in a list": lambda m, x, s: m(x, list(s)),
    "none": lambda m, x, s: m(x),
    "packed": lambda m, x, s: m(pack_padded_sequence(x, [4, 2]), s),
    "packed, unsorted": lambda m, x, s: m(pack_padded_sequence(x, [2, 4], enforce_sorted=False), s),
    "no rows": lambda m, x, s: m(x[:, :0], tuple(a[:, :0] for a in s)),
    "one step": lambda m, x, s: m(x[:1], s),
    "autocast": lambda m, x, s: torch.autocast("cpu", torch.bfloat16)(m)(x, s),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("options", [{}, {"proj_size": 3}, {"num_layers": 2}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_states_are_detached_and_changed_in_place(call, options, gradients):
    """As truncated backpropagation and burn-in do."""
    options = {"dtype": torch.float32} | options
    theirs, scale = nn.LSTM(5, 7, **options), torch.full((1,), 0.5, requires_grad=True)
    module, dtype = fastlstm.LSTM.from_torch(copy.deepcopy(theirs)), options["dtype"]
    x, layers = torch.randn(4, 2, 5, dtype=dtype), options.get("num_layers", 1)
    states = torch.randn(layers, 2, options.get("proj_size", 7), dtype=dtype), torch.randn(layers, 2, 7, dtype=dtype)
    for _ in range(3):  # the first packs weights, which others have
        results = []
        for each in (theirs, module):
            with torch.set_grad_enabled(gradients):
                _, found = CALLS[call](each, x, states)
            for a in found:
                if gradients:
                    a.detach_()
                a.mul_(scale.to(a.dtype))
            results.append(found)
        for want, got in zip(*results):
            # of bfloat16 two neighbours, otherwise some roundings of values within 1
            bound = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, want, rtol=0, atol=bound, check_dtype=False)  # autocast's is its own test


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        (fastlstm.LSTM(5, 7, batch_first=True), "input"),
        (fastlstm.LSTM(5, 7, dtype=torch.float64), "output"),
        (fastlstm.GRU(5, 7), "output"),
        (fastlstm.Elman(5, 7), "output"),
        (fastlstm.LSTMCell(5, 7, backend="numba"), "input"),
    ],
)
def test_what_is_saved_is_not_copied(module, changed):
    """Torch has copies of these; here autograd notices that they have changed."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not isinstance(module, fastlstm.LSTMCell) or "bias" in name)
    x = torch.randn(4, 5, dtype=next(module.parameters()).dtype)
    output = module(x)[0]
    (x if changed == "input" else output).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU, fastlstm.Elman])
def test_an_output_of_both_directions_may_be_changed_in_place(kind, planned):
    """As torch's, which joins the directions by a copy."""
    module, x, gradients = kind(5, 7, bidirectional=True), torch.randn(4, 2, 5), []
    if planned:
        module(x)
    for changes in (False, True):
        output = module(x)[0]
        doubled = output.mul_(2) if changes else output * 2
        gradients.append(torch.autograd.grad(doubled.sum(), list(module.parameters())))
    assert all(map(torch.equal, *gradients))
