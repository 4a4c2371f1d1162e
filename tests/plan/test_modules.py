"""All layers and directions of a module in one call: results, every gradient, and second derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlstm
from tests.helpers.modules import flat, pair
from tests.helpers.threads import split, splits
from tests.helpers.tolerances import close


@st.composite
def calls(draw):
    """A pair of modules in float64 and ours in float32 or float64, and the arguments of a call for each."""
    kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
    T, B, I, H = (draw(st.sampled_from(of)) for of in ((1, 2, 7, 30), (1, 3, 8, 33), (1, 5, 46), (1, 7, 17, 40)))
    options = {
        "num_layers": draw(st.integers(1, 3)),
        "bidirectional": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
    }
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    theirs, ours = pair(I, H, like=kind, dtype=draw(st.sampled_from([torch.float32, torch.float64])), **options)
    theirs.load_state_dict(ours.state_dict())  # rounded as ours are
    names = [name for name, _ in theirs.named_parameters()]
    for name in draw(st.lists(st.sampled_from(names), max_size=len(names), unique=True)):
        for module in (theirs, ours):
            module.get_parameter(name).requires_grad_(False)
    parts = options["num_layers"] * (1 + options["bidirectional"])
    x = torch.randn(*((B, T) if options["batch_first"] else (T, B)), I, dtype=next(ours.parameters()).dtype)
    states = [torch.randn(parts, B, H, dtype=x.dtype) for _ in range(2 if kind is nn.LSTM else 1)]
    given_states = draw(st.booleans())
    wanted = [a.requires_grad_(draw(st.booleans())) for a in (x, *states)]
    return theirs, ours, wanted if given_states else wanted[:1]


def run(module, x, *states):
    hx = None if not states else states[0] if len(states) == 1 else states
    return flat(module(x, hx))


def gradients_of(module, arguments, results, directions, create_graph=False):
    leaves = [a for a in (*arguments, *module.parameters()) if a.requires_grad]
    if not leaves:
        return []
    return torch.autograd.grad(results, leaves, directions, create_graph=create_graph, allow_unused=True)


@settings(deadline=None, max_examples=60)
@given(calls(), splits)
def test_results_and_gradients(call, threads):
    theirs, ours, arguments = call
    exact = [a.detach().double().requires_grad_(a.requires_grad) for a in arguments]
    with split(*threads):
        expected = run(theirs, *exact)
        for _ in range(2):  # the second call follows the plan
            results = run(ours, *arguments)
            with torch.no_grad():
                without = run(ours, *arguments)
            close(results, expected, "sums")
            assert all(torch.equal(a, b) for a, b in zip(results, without, strict=True))
            directions = [torch.randn_like(a) for a in results]
            gradients = gradients_of(ours, arguments, results, directions)
            wanted = gradients_of(theirs, exact, expected, [a.double() for a in directions])
            close(gradients, wanted, "gradients")
            expected = run(theirs, *exact)


def test_a_later_weight_of_another_dtype_is_no_old_plan_s():
    """A module that was called before raises, as a new one does."""
    module, x = fastlstm.LSTM(3, 5, 2), torch.randn(4, 2, 3)
    module(x)
    module.weight_hh_l1.data = module.weight_hh_l1.data.double()
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        module(x)


def test_frozen_layers_run_no_backward_pass(calls):
    """As in fine-tuning the top of a model: what nobody wants is neither computed nor kept."""
    module, x = fastlstm.LSTM(4, 6, 3, backend="numba"), torch.randn(5, 2, 4)
    for name, weight in module.named_parameters():
        weight.requires_grad_(name.endswith("l2"))
    module(x)[0].sum().backward()
    assert calls.count("backward") == 1
    assert [name for name, weight in module.named_parameters() if weight.grad is not None] == [
        name for name, _ in module.named_parameters() if name.endswith("l2")
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_second_derivatives_under_hooks_of_saved_tensors(layers):
    theirs, ours = pair(3, 5, layers)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        with torch.autograd.graph.save_on_cpu():
            (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
            results.append(torch.autograd.grad((gradient**2).sum(), [x, *module.parameters()], allow_unused=True))
    close(results[1], results[0], "derivatives")
