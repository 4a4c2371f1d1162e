"""Everything that a call's way depends on belongs to its signature: a plan of another call is never run."""

import threading

import pytest
import torch
from torch.func import functional_call

import fastlstm
from fastlstm import plan
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.modules import REFERENCE, pair
from tests.helpers.tolerances import close

T, B, I, H = 5, 3, 4, 6


@pytest.fixture(params=CPU_BACKENDS)
def modules(request):
    """A module that has plans already, and torch's own in float64."""
    theirs, ours = pair(I, H, like=REFERENCE, dtype=torch.float32, backend=request.param)
    x, states = torch.randn(T, B, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    for _ in range(2):
        ours(x, states)[0].sum().backward()
        with torch.no_grad():
            ours(x, states), ours.step(x[0], states)
    return ours, theirs


def check(ours, theirs, x, states=None):
    got = ours(x, states)
    want = theirs(x.double(), None if states is None else tuple(a.double() for a in states))
    close([got[0], *got[1]], [want[0], *want[1]], "sums")


@torch.no_grad()
@pytest.mark.parametrize("change", ["negated", "transposed", "expanded", "no parameter"])
def test_weights_that_lie_in_another_way(modules, change):
    ours, theirs = modules
    change_of = {
        "negated": lambda a: torch._neg_view(-a),
        "transposed": lambda a: a.mT.contiguous().mT if a.dim() == 2 else a,
        "expanded": lambda a: a[:, :1].expand_as(a) if a.dim() == 2 else a[:1].expand_as(a),
        "no parameter": lambda a: a.clone(),
    }[change]
    weights = {name: change_of(a.detach()) for name, a in ours.named_parameters()}
    x = torch.randn(T, B, I)
    for _ in range(2):
        got = functional_call(ours, weights, (x,))[0]
        want = functional_call(theirs, {name: a.double() for name, a in weights.items()}, (x.double(),))[0]
        close([got], [want], "sums")


@torch.no_grad()
def test_weights_on_another_device_are_told(modules):
    ours, _ = modules
    weights = {name: a.to("meta") for name, a in ours.named_parameters()}
    with pytest.raises(RuntimeError, match="not at the same device"):
        functional_call(ours, weights, (torch.randn(T, B, I),))


@torch.no_grad()
def test_inputs_that_lie_in_another_way(modules):
    ours, theirs = modules
    x, states = torch.randn(T, B, I), (torch.randn(1, B, H), torch.randn(1, B, H))
    for given in (x, x.mT.contiguous().mT, torch._neg_view(-x), x.expand(2, T, B, I)[1], x[:, :1].expand_as(x)):
        check(ours, theirs, given)
        check(ours, theirs, given, states)
    for given in (
        tuple(a.mT.contiguous().mT for a in states),
        tuple(torch._neg_view(-a) for a in states),
        states[::-1],
    ):
        check(ours, theirs, x, given)


@pytest.mark.parametrize(
    "states",
    [
        (torch.zeros(1, B, H + 1), torch.zeros(1, B, H)),
        (torch.zeros(1, B, H), torch.zeros(1, B + 1, H)),
        (torch.zeros(1, B, H), torch.zeros(1, B, H, dtype=torch.float64)),
        (torch.zeros(1, B, H, device="meta"), torch.zeros(1, B, H)),
        (torch.zeros(2, B, H), torch.zeros(2, B, H)),
    ],
    ids=["width", "rows", "dtype", "device", "layers"],
)
def test_bad_states_raise_after_good_ones(modules, states):
    ours, _ = modules
    for _ in range(2):
        with pytest.raises(RuntimeError), torch.no_grad():
            ours(torch.randn(T, B, I), states)


def test_gradients_that_are_wanted_of_other_tensors(modules):
    ours, theirs = modules
    x = torch.randn(T, B, I)
    exact = x.double().requires_grad_()
    names = ["weight_hh_l0", "bias_ih_l0"]
    for wanted in ([], names[:1], names[1:], names):
        for module in modules:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in wanted)
        leaf = x.clone().requires_grad_()
        got = torch.autograd.grad(ours(leaf)[0].sin().sum(), [leaf, *(getattr(ours, name) for name in wanted)])
        want = torch.autograd.grad(theirs(exact)[0].sin().sum(), [exact, *(getattr(theirs, name) for name in wanted)])
        close(got, want, "gradients")


@torch.no_grad()
def test_settings_that_change_between_calls(modules):
    ours, theirs = modules
    x, threads = torch.randn(T, B, I), torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            check(ours, theirs, x)
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x)[0].dtype == torch.bfloat16
    check(ours, theirs, x)
    ours.backend = "reference"
    want = ours(x)[0]
    ours.backend = None
    with fastlstm.use_backend("reference"):
        assert torch.equal(ours(x)[0], want)


@torch.no_grad()
def test_more_signatures_than_are_kept(modules):
    ours, theirs = modules
    for steps in (*range(1, plan.MOST + 9), 1):
        check(ours, theirs, torch.randn(steps, 1, I))


@torch.no_grad()
def test_threads_that_make_plans_at_once(modules):
    ours, theirs = modules
    inputs = [torch.randn(steps, 2, I) for steps in range(1, 2 * plan.MOST, 3)]
    wrong = []

    def call(inputs):
        for x in inputs:
            got, want = ours(x)[0], theirs(x.double())[0]
            if not torch.allclose(got.double(), want, atol=1e-5):
                wrong.append(len(x))

    threads = [threading.Thread(target=call, args=(inputs[:: 1 if k else -1],)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
