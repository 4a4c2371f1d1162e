"""Everything that a call's way depends on belongs to its signature: a plan of another call is never run."""

import copy
import gc
import os
import weakref

import pytest
import torch
from torch.func import functional_call

import fastlstm
from fastlstm import cells, plan_cache
from tests.helpers.layers import CPU_BACKENDS
from tests.helpers.memory import resident
from tests.helpers.modules import REFERENCE, pair
from tests.helpers.threads import at_once
from tests.helpers.tolerances import close, equal

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
@pytest.mark.parametrize("wrong", ["x", "h_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_tensor_of_another_dtype_is_told(backend, wrong):
    """By the signature: a function of tensors looks at no dtype before it runs a plan."""
    sizes = {"x": (T, B, I), "h_0": (B, H), "weight_ih": (4 * H, I), "weight_hh": (4 * H, H)}
    tensors = {name: torch.randn(size) for name, size in (sizes | {"bias_ih": (4 * H,), "bias_hh": (4 * H,)}).items()}

    def call(x, h_0, *weights):
        return fastlstm.lstm(x, (h_0, h_0), *weights, backend=backend)

    for _ in range(2):
        call(*tensors.values())
    with pytest.raises((RuntimeError, ValueError), match=r"dtype|type"):
        call(*(tensors | {wrong: tensors[wrong].double()}).values())


@torch.no_grad()
def test_weights_on_another_device_are_told(modules):
    ours, _ = modules
    weights = {name: a.to("meta") for name, a in ours.named_parameters()}
    with pytest.raises(RuntimeError, match="not at the same device"):
        functional_call(ours, weights, (torch.randn(T, B, I),))


@torch.no_grad()
def test_settings_that_change_between_calls(modules, set_threads):
    ours, theirs = modules
    x = torch.randn(T, B, I)
    for count in (1, 3, 2):
        set_threads(count)
        check(ours, theirs, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x)[0].dtype == torch.bfloat16
    check(ours, theirs, x)
    ours.backend = "reference"
    want = ours(x)[0]
    ours.backend = None
    with fastlstm.use_backend("reference"):
        assert torch.equal(ours(x)[0], want)


@torch.no_grad()
def test_plans_of_all_modules_are_bounded_together(modules, monkeypatch):
    ours, theirs = modules
    others = [copy.deepcopy(ours) for _ in range(2)]
    monkeypatch.setattr(plan_cache, "MAX_PLANS", 5)
    for steps in (*range(1, 12), 1, 11):
        for each in (ours, *others):
            check(each, theirs, torch.randn(steps, 1, I))
            assert sum(len(m._plans[0].plans) for m in (ours, *others) if "_plans" in vars(m)) <= 5
        others[0] = copy.deepcopy(ours)  # plans of a module that is gone do not count for ever


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_takes_little_memory(modules, dtype):
    """Signatures that differ in a stride alone, so that all else of each call has the same size."""
    ours, count = modules[0].to(dtype), 400
    memory = torch.randn(1 << 20).to(dtype)

    def run(strides):
        for stride in strides:
            ours(memory.as_strided((T, 64, I), (64 * stride, stride, 1)))[0].sum().backward()
        gc.collect()

    run(range(I, I + 50))
    before = resident()
    run(range(I + 50, I + 50 + count))
    assert (resident() - before) / count < 30_000  # objects of Python are 25 KB of it, and the allocator loses some


@torch.no_grad()
def test_threads_that_make_plans_at_once(modules, monkeypatch):
    ours, theirs = modules
    monkeypatch.setattr(plan_cache, "MAX_PLANS", 5)
    inputs = [torch.randn(steps, 2, I) for steps in range(1, 40)]
    wrong = []

    def call(inputs):
        for x in inputs:
            got, want = ours(x)[0], theirs(x.double())[0]
            if not torch.allclose(got.double(), want, atol=1e-5):
                wrong.append(len(x))

    at_once(lambda: call(inputs), lambda: call(inputs[::-1]))
    assert not wrong


@torch.no_grad()
def test_a_plan_that_is_removed_while_a_call_looks_for_it_is_not_kept(monkeypatch):
    """The removal comes from another thread, here from within the call."""
    module, other = (fastlstm.LSTM(I, H, backend="numba") for _ in range(2))
    x, make = torch.randn(T, B, I), plan_cache.recognizer
    monkeypatch.setattr(plan_cache, "MAX_PLANS", 1)
    module(x)
    plan = weakref.ref(next(iter(module._plans[0].plans.values())).__self__)

    def recognizer(tensors):
        if plan() is not None:
            other(x)
        return make(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(plan_cache, "recognizer", recognizer)
        module(x)
    gc.collect()
    assert plan() is None


@torch.no_grad()
def test_weights_without_memory_of_their_own(modules):
    """What no kernel can read goes another way, though a call of the same shapes has a plan."""
    ours, theirs = modules
    x, weights = torch.randn(T, B, I), {name: a.detach().clone() for name, a in ours.named_parameters()}
    functional_call(ours, weights, (x,))
    left = []
    torch.func.grad(lambda a: (left.append(a), a.sum())[1])(weights["weight_ih_l0"])
    zeros = torch._efficientzerotensor(weights["weight_hh_l0"].shape)
    for change in ({"weight_ih_l0": left[0]}, {"weight_hh_l0": zeros}):
        got = functional_call(ours, weights | change, (x,))[0]
        exact = {
            k: torch.zeros_like(weights[k]).double() if v is zeros else weights[k].double() for k, v in change.items()
        }
        want = functional_call(theirs, {k: v.double() for k, v in weights.items()} | exact, (x.double(),))[0]
        close([got], [want], "sums")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [False, True])
def test_saved_tensors_that_come_back_in_another_layout(modules, dtype, part):
    """As hooks that compress or offload them give them back."""
    x = (torch.randn(64, B, 40)[..., :I] if part else torch.randn(B, 64, I).transpose(0, 1)).to(dtype)
    states = torch.randn(2, 1, B, H, dtype=dtype, requires_grad=True)
    check_layouts(modules[0].to(dtype), x, tuple(states))


def test_saved_params_of_a_cell_that_come_back_in_another_layout():
    module = fastlstm.RNN(cells.peephole_lstm, I, H)
    check_layouts(module, torch.randn(T, B, I), tuple(torch.randn(2, 1, B, H, requires_grad=True)))


def check_layouts(module, x, states):
    def gradients(pack):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
            output = module(x, states)[0]
        return torch.autograd.grad(output.sum(), [*module.parameters(), *states])

    want = gradients(lambda a: a)
    for pack in (
        lambda a: a.clone(memory_format=torch.contiguous_format),
        lambda a: a.mT.contiguous().mT if a.dim() > 1 else a,
        lambda a: a.repeat_interleave(2, -1)[..., ::2],
        lambda a: a.repeat_interleave(2)[::2] if a.dim() == 1 else a,
    ):
        equal(gradients(pack), want)
    for negated in (lambda a: True, lambda a: a.dim() == 2):  # everything, or the weights alone
        found = gradients(lambda a: torch._neg_view(-a) if negated(a) else a)  # noqa: B023  called within the turn
        for got, expected in zip(found, want, strict=True):
            close(got, expected.double(), "long")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, T])
def test_a_module_that_changes_its_type_before_the_backward_pass(modules, steps, dtype):
    ours = modules[0]
    for _ in range(2):
        ours.float()
        output = ours(torch.randn(steps, B, I))[0]
        ours.to(dtype)
        with pytest.raises(RuntimeError, match=f"of torch.float32 that .* has become {dtype} since the forward pass"):
            output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["all", "weights", "x and states", "kept"])
def test_hooks_that_give_saved_tensors_back_in_another_type(modules, which, dtype):
    ours, x = modules[0].to(dtype), torch.randn(T, B, I, dtype=dtype)

    def unpack(a):
        kind = "weights" if a.shape[0] == 4 * H else "x and states" if a.shape in ((T, B, I), (1, B, H)) else "kept"
        return a.double() if which in ("all", kind) else a

    with torch.autograd.graph.saved_tensors_hooks(lambda a: a, unpack):
        output = ours(x, tuple(torch.randn(2, 1, B, H, dtype=dtype)))[0]
    with pytest.raises(RuntimeError, match=r"has become torch.float64 since the forward pass"):
        output.float().sum().backward()


def test_a_number_of_threads_that_changes_before_the_backward_pass(modules, set_threads):
    ours, theirs = modules
    x = torch.randn(40, 64, I)
    set_threads(2)
    output = ours(x)[0]
    set_threads(1)
    got = torch.autograd.grad(output.sum(), list(ours.parameters()))
    close(got, torch.autograd.grad(theirs(x.double())[0].sum(), list(theirs.parameters())), "long")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_output_of_16_bits_may_be_changed_in_place(modules, dtype):
    """The backward pass does not read it, but in float32, where that is noticed."""
    ours = modules[0].to(dtype)
    output = ours(torch.randn(T, B, I, dtype=dtype))[0].mul_(2)
    if dtype == torch.float16:
        output.sum().backward()
    elif dtype == torch.float32:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plans_end_with_their_module(modules, dtype):
    """Without the garbage collector: they hold packed weights."""
    gc.collect()
    gc.disable()
    try:
        ours = fastlstm.LSTM(I, H, dtype=dtype, backend=modules[0].backend)
        x = torch.randn(T, B, I, dtype=dtype)
        ours(x)[0].sum().backward()
        with torch.no_grad():
            ours(x)
            ours(x.transpose(0, 1).contiguous().transpose(0, 1))
        kept = [weakref.ref(run.__self__) for run in ours._plans[0].plans.values() if hasattr(run, "__self__")]
        del ours
        assert not any(plan() for plan in kept)
    finally:
        gc.enable()
