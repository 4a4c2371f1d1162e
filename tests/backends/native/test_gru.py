"""The GRU of the native backend: beside the reference and torch.nn.GRU, and the same bits in any company."""

import pytest
import torch

from fastlstm import cells
from fastlstm.backends import csrc, native, reference
from fastlstm.backends.base import Gradients, Run
from tests.backends.native import test_native, test_plans
from tests.backends.native.test_plans import BOUNDS, all_of, close, draw, gradients_of, poisoned, states_of, truth_of

pytestmark = test_plans.pytestmark
__all__ = ["poisoned"]  # a fixture


@pytest.fixture(autouse=True)
def two_threads_at_most():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(layer, grads, needs, threads=1):
    """All that a call gives, with gradients."""
    torch.set_num_threads(threads)
    run = native.forward(layer, True)
    return run, native.backward(grads, layer, run, needs)


def same(got, want):
    for a, b in zip(got, want):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize(("lengths", "reset"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("B", [1, 2, 33])
@pytest.mark.parametrize("H", [1, 7, 100, 650])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_results_and_gradients_are_the_references(dtype, H, B, lengths, reset, states, reverse):
    """Two threads give the bits of one, and each gradient alone is that among all."""
    layer = draw(cells.gru, 3 if H == 650 else 6, B, 5, H, lengths=lengths, reset=reset, reverse=reverse)
    if not states:
        layer = layer._replace(states=(None,))
    needs, grads = all_of(cells.gru, states), gradients_of(layer)
    truth, want = truth_of(layer, grads, needs)
    layer, grads = test_plans.to(layer, dtype), test_plans.to(grads, dtype)
    run, got = results(layer, grads, needs)
    for a, b in zip((*states_of(run), *got.flat), (*states_of(truth), *want.flat)):
        close(a, b, dtype)
    other, gradients = results(layer, grads, needs, threads=2)
    same((*states_of(other), *gradients.flat), (*states_of(run), *got.flat))
    for k in range(len(needs.flat)):
        alone = Gradients.of(cells.gru, [k == n and needed for n, needed in enumerate(needs.flat)])
        found = native.backward(grads, layer, run, alone).flat
        same(found, [a if needed else None for a, needed in zip(got.flat, alone.flat)])


@pytest.mark.parametrize("of_last", [False, True])
@pytest.mark.parametrize("of_h", [False, True])
def test_absent_gradients_are_zeros(of_h, of_last):
    layer, needs = draw(cells.gru, 4, 3, 5, 20), all_of(cells.gru)
    grads = gradients_of(layer)
    zeros = Run(torch.zeros_like(grads.h), (torch.zeros_like(grads.last[0]),), ())
    absent = Run(grads.h if of_h else None, (grads.last[0] if of_last else None,), ())
    filled = Run(grads.h if of_h else zeros.h, grads.last if of_last else zeros.last, ())
    same(results(layer, absent, needs)[1].flat, results(layer, filled, needs)[1].flat)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("H", "I"), [(7, 1), (100, 30), (128, 28)])
def test_a_row_alone_is_what_it_is_in_a_batch(H, I, dtype):
    layer, needs = test_plans.to(draw(cells.gru, 5, 33, I, H, lengths=True, reset=True), dtype), all_of(cells.gru)
    grads = test_plans.to(gradients_of(layer), dtype)
    run, got = results(layer, grads, needs)
    for b in (0, 5, 31):
        row = slice(b, b + 1)
        one = layer._replace(
            x=layer.x[:, row],
            states=(layer.states[0][row],),
            lengths=layer.lengths[row],
            reset=layer.reset[:, row].contiguous(),
        )
        other, gradients = results(one, Run(grads.h[:, row].contiguous(), (grads.last[0][row],), ()), needs)
        same((other.h, other.last[0]), (run.h[:, row], run.last[0][row]))
        same((gradients.x, gradients.states[0]), (got.x[:, row], got.states[0][row]))


def test_the_results_are_torchs():
    T, B, I, H = 6, 5, 4, 19
    module = torch.nn.GRU(I, H, dtype=torch.float64)
    x, h_0 = torch.randn(T, B, I, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    x.requires_grad_(), h_0.requires_grad_()
    output, h_n = module(x, h_0.unsqueeze(0))
    grads = Run(torch.randn_like(output), (torch.randn_like(h_0),), ())
    inputs = (x, *module.parameters(), h_0)
    wanted = torch.autograd.grad((output, h_n), inputs, (grads.h, grads.last[0].unsqueeze(0)))
    layer = draw(cells.gru, T, B, I, H)
    detached = [a.detach() for a in inputs]
    layer = layer._replace(x=detached[0], weights=tuple(detached[1:5]), states=(detached[5],))
    run, got = results(layer, grads, all_of(cells.gru))
    for a, b in zip((run.h, run.last[0], *got.flat), (output.detach(), h_n[0].detach(), *wanted)):
        close(a, b, torch.float64)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_instruction_set_of_this_processor(dtype, monkeypatch):
    for instructions in test_native.instruction_sets():
        monkeypatch.setattr(csrc, "instructions", instructions)
        for size in ((3, 7, 5, 9), (2, 13, 28, 40), (5, 70, 33, 100), (1, 64, 1, 2)):
            layer, needs = draw(cells.gru, *size, lengths=True, reset=True), all_of(cells.gru)
            grads = gradients_of(layer)
            truth, want = truth_of(layer, grads, needs)
            run, got = results(test_plans.to(layer, dtype), test_plans.to(grads, dtype), needs)
            for a, b in zip((*states_of(run), *got.flat), (*states_of(truth), *want.flat)):
                close(a, b, dtype)


def test_infinite_inputs_reach_what_they_reach_in_torch():
    """n_x of an infinite row is infinite, and n_h is not touched: H ends within a panel."""
    layer = draw(cells.gru, 2, 3, 4, 9)
    layer.x[0, 1, 2] = torch.inf
    run, truth = native.forward(layer, False), reference.forward(layer, False)
    assert torch.equal(run.h.isnan(), truth.h.isnan())
    close(run.h.nan_to_num(), truth.h.nan_to_num(), torch.float64)
