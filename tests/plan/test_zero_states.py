"""States of zeros: what they are multiplied with is left out, and nothing else changes.

A state of -0.0 is as much zero, but not to the kernels, which look at bits.
"""

import pytest
import torch

import fastlstm
from benchmarks.shared.clock import num_threads
from fastlstm import lstm
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.modules import pair
from tests.helpers.tolerances import close


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_weights_that_meet_nothing(backend):
    """A lone step's weight_hh may hold what it likes: the one result that is not torch.nn.LSTM's."""
    module = fastlstm.LSTM(7, 40, backend=backend)
    module.weight_hh_l0.data.fill_(torch.inf)
    assert module(torch.randn(1, 3, 7))[0].isfinite().all()
    assert module(torch.randn(2, 3, 7))[0][1].isnan().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_row_that_is_not_zero(backend, threads):
    """Then no row's product is left out, whichever thread has it: what meets infinity is the same on any number."""
    x, w_ih, w_hh, state = torch.randn(2, 64, 28), torch.randn(256, 28), torch.randn(256, 64), torch.zeros(64, 64)
    w_hh[5], state[40] = torch.inf, 1.0
    with num_threads(threads):
        output = lstm(x, (state, state), w_ih, w_hh, backend=backend)[0]
    assert output[0, :, 5].isnan().sum() == 63  # 0 times infinity
    assert output[0, 40].isfinite().all()


@pytest.mark.parametrize("state", [0.0, 0.5])
def test_no_inputs_at_all(state):
    x, w_ih, w_hh, bias = torch.randn(3, 4, 0), torch.randn(80, 0), torch.randn(80, 20), torch.randn(80)
    hx, results = (torch.full((4, 20), state), torch.full((4, 20), state)), []
    for backend in ("numba", "reference"):
        weights = [a.requires_grad_() for a in (w_ih, w_hh, bias)]
        output = lstm(x, hx, *weights, backend=backend)[0]
        results.append((output, *torch.autograd.grad(output.sum(), weights)))
    close(*results, "sums")


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradients_go_through_weights_that_meet_zeros(backend, cell):
    """A step with gradients looks at all of weight_hh, though its product is left out: dh_0 goes through it."""
    like, x = torch.nn.LSTMCell if cell else torch.nn.LSTM, torch.randn(3, 7)
    theirs, ours = pair(7, 40, like=like, exact=torch.float32, dtype=torch.float32, backend=backend)
    x, size = (x, (3, 40)) if cell else (x.unsqueeze(0), (1, 3, 40))
    results = []
    for scale in (1, -2):
        next(p for name, p in ours.named_parameters() if name.startswith("weight_hh")).data.mul_(scale)
        theirs.load_state_dict(ours.state_dict())
        for module in (ours, theirs):
            states = [torch.zeros(size, requires_grad=True) for _ in range(2)]
            h = module(x, tuple(states))[0]
            results.append(torch.autograd.grad(h.sum(), states))
    for got, want in ((results[0], results[1]), (results[2], results[3])):
        for a, b in zip(got, want):
            assert (a - b).abs().max() < 2e-6


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_of_some_rows_alone(backend, T):
    """The others' products are not left out with them."""
    x, w_ih, w_hh = torch.randn(T, 6, 5), torch.randn(80, 5), torch.randn(80, 20)
    state = torch.randn(6, 20)
    state[:4] = 0
    got = lstm(x, (state, state), w_ih, w_hh, backend=backend)[0]
    want = lstm(x.double(), (state.double(),) * 2, w_ih.double(), w_hh.double(), backend="reference")[0]
    assert (got - want).abs().max() < 2e-6  # one rounding of sums of 25 terms, twice over
