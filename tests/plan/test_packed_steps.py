"""A time step a call, with gradients: the weights stay packed from one step to the next, and nothing else changes."""

import gc
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fastlstm
from tests.helpers.layers import CPU_BACKENDS, UNAVAILABLE, Layer
from tests.helpers.modules import pair, results, same
from tests.helpers.numba import under
from tests.helpers.tolerances import BF16, F16, F32

cells = partial(pair, like=nn.LSTMCell)
needs_no_unit = pytest.mark.skipif(UNAVAILABLE["numba-bf16"] is None, reason="bfloat16 is multiplied as it is here")


def unrolled(cell, xs, state):
    outputs = []
    for x in xs:
        state = cell(x, state)
        outputs.append(state[0])
    return torch.stack(outputs), *state


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    with fastlstm.use_backend(request.param):
        yield request.param


def test_packed_once_for_all_steps_of_an_update(calls):
    cell = fastlstm.LSTMCell(5, 6, backend="numba")
    xs = torch.randn(4, 2, 5)
    state = torch.zeros(2, 6), torch.zeros(2, 6)
    cell(xs[0], state)
    assert calls.count("pack") == 1  # the transposed ones wait until a backward pass wants them
    unrolled(cell, xs, state)[0].sum().backward()
    assert calls.count("pack") == 2
    assert calls.count("forward") == 5
    assert calls.count("backward") == 4
    torch.optim.SGD(cell.parameters(), 0.1).step()
    cell(xs[0], state)
    assert calls.count("pack") == 3
    cell.release_memory()
    cell(xs[0], state)
    assert calls.count("pack") == 4


def test_a_single_step_of_a_layer(calls):
    lstm = fastlstm.LSTM(5, 6, backend="numba")
    x = torch.randn(1, 2, 5)
    lstm(x)[0].sum().backward()
    assert calls.count("pack") == 1  # nobody wanted a gradient of the state or of x
    lstm(x)
    assert calls.count("pack") == 1
    lstm(torch.randn(2, 2, 5))
    lstm(x)
    assert calls.count("pack") == 1  # more steps pack their own: at the next call the weights are others


@pytest.mark.parametrize(("I", "H"), [(200, 272), (17, 528)])
def test_few_rows_read_large_weights_where_they_lie(I, H, calls):
    with torch.no_grad():
        fastlstm.LSTM(I, H, backend="numba")(torch.randn(1, 1, I))
    assert calls.count("pack") == 0


@pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=needs_no_unit), F16])
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.LSTMCell])
def test_no_weights_of_16_bits_are_packed_again(dtype, kind, calls):
    module, axis = kind(30, 40, dtype=dtype, backend="numba"), (1,) * (kind is fastlstm.LSTM)
    inputs = [torch.randn(*axis, 2, n).to(dtype) for n in (30, 40, 40)]
    for _ in range(4):
        results(module, inputs, [inputs[1]] * (2 + len(axis)))
    assert calls.count("pack") == 2  # for the forward pass, and transposed


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_weights_made_in_inference_mode_are_refused(dtype):
    with torch.inference_mode():
        module = fastlstm.LSTM(5, 6, dtype=dtype, backend="numba")
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(torch.randn(1, 2, 5).to(dtype).requires_grad_())


def test_graphs_that_are_kept_keep_no_packed_weights_of_older_updates(backend, calls):
    cell, losses = fastlstm.LSTMCell(5, 6), []
    for _ in range(4):
        with torch.no_grad():
            cell.weight_hh.add_(1)
        losses.append(cell(torch.randn(2, 5), (torch.randn(2, 6), torch.randn(2, 6)))[0].sum())
    gc.collect()
    assert [kept() is not None for kept in calls.packed] == [False, False, False, True]
    cell.release_memory()
    losses[-1].backward()
    losses.clear()
    gc.collect()
    assert not any(kept() is not None for kept in calls.packed)


def test_transposed_weights_belong_to_the_packed_ones():
    """Changed and restored in between, through .data: what was packed for one product fits the other's."""
    theirs, ours = cells(5, 6)
    x, state = torch.randn(2, 5, dtype=torch.float64).requires_grad_(), tuple(torch.randn(2, 2, 6, dtype=torch.float64))
    h, _ = ours(x, state)
    kept = ours.weight_ih.detach().clone()
    ours.weight_ih.data.mul_(3)
    h.sum().backward()
    ours.weight_ih.data.copy_(kept)
    results = [torch.autograd.grad(module(x, state)[0].sum(), x)[0] for module in (theirs, ours)]
    assert (results[0] - results[1]).abs().max() < 1e-14


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (3, 7, 28, 100), (1, 120, 64, 128), (5, 1, 100, 7), (2, 3, 130, 33)])
def test_weight_gradients_of_few_rows_are_those_of_many(size, reverse, masked):
    """Bit for bit: the sums have one order, wherever they are written."""
    layer = Layer(*size, reverse=reverse, masked=masked)

    def gradients():
        inputs = layer.to(F32)
        return torch.autograd.grad(layer.run(inputs, "numba"), inputs, [g.float() for g in layer.gradients])

    few, many = (under(gradients, 2, FEW_PAIRS=rows) for rows in (0, 1 << 30))
    assert same(few, many)


def test_weights_saved_as_copies(backend):
    """What a hook kept counts, not what the parameter holds by the time of the backward pass."""
    results = []
    x, state = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 2, 6, dtype=torch.float64)
    for module in cells(5, 6):
        leaves = [x.clone().requires_grad_(), state.clone().requires_grad_()]
        with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            h, _ = module(leaves[0], tuple(leaves[1]))
        with torch.no_grad():
            module.weight_ih.mul_(2)
            module.weight_hh.mul_(2)
        results.append(torch.autograd.grad(h.sum(), leaves))
    assert max((a - b).abs().max() for a, b in zip(*results, strict=True)) < 1e-14


def test_states_that_are_changed_in_place(backend):
    results = []
    xs, state = torch.randn(3, 2, 4, dtype=torch.float64), tuple(torch.randn(2, 2, 3, dtype=torch.float64))
    for module in cells(4, 3):
        module(xs[0], state)
        h, c = module(xs[0], state)
        h.mul_(2)
        c.add_(1)
        h, c = module(xs[1], (h, c))
        h.mul_(2)
        results.append(torch.autograd.grad((h * c).sum(), list(module.parameters())))
    assert max((a - b).abs().max() for a, b in zip(*results, strict=True)) < 1e-13
