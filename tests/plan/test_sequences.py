"""A call in training under no transform: the bits of one under transforms, and all derivatives."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, vjp
from torch.utils.checkpoint import checkpoint

import fastlstm
from tests.helpers.tolerances import close, equal

SIZES = [(7, 5, 3, 9), (1, 3, 4, 300), (20, 1, 28, 100)]


def directions(outputs):
    torch.manual_seed(1)
    return tuple(torch.randn_like(a) for a in outputs)


def gradients_of(outputs, inputs):
    return torch.autograd.grad(outputs, inputs, directions(outputs))


def length(gradients):
    return sum(g.float().square().sum() for g in gradients)


def by_transforms(run, inputs, twice=False):
    """Outputs of `run` and its gradients by `vjp`, and if `twice` the derivatives of their length."""
    inputs = [a.detach() for a in inputs]
    outputs, pull = vjp(run, *inputs)
    incoming = directions(outputs)
    results = [*outputs, *pull(incoming)]
    if twice:
        loss, pull = vjp(lambda *inputs: length(vjp(run, *inputs)[1](incoming)), *inputs)
        results += pull(torch.ones_like(loss))
    return results


def function_of(module, names, with_states):
    """`module` as a function of x, of states where these are given, and of its parameters: a flat tuple of results."""

    def run(x, *rest, **given):
        count = 2 if with_states else 0
        hx = tuple(rest[:2]) if with_states else None
        output, states = functional_call(module, dict(zip(names, rest[count:], strict=True)), (x, hx), given)
        return output, *states

    return run


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_states", [True, False])
@pytest.mark.parametrize("to_x", [True, False])
def test_as_under_a_transform(size, bias, batch_first, with_states, to_x, calls):
    T, B, I, H = size
    module = fastlstm.LSTM(I, H, bias=bias, batch_first=batch_first, backend="numba")
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, requires_grad=to_x)
    states = [torch.randn(1, B, H, requires_grad=True) for _ in range(2)] if with_states else []
    output, ends = module(x, tuple(states) or None)
    got = [output, *ends]
    inputs = [x, *states, *module.parameters()]
    got += gradients_of(got, inputs if to_x else inputs[1:])
    assert calls.count("backward") == 1
    want = by_transforms(function_of(module, list(dict(module.named_parameters())), with_states), inputs)
    if not to_x:
        del want[3]
    equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [*SIZES, (90, 8, 70, 800)])  # the last in memory that is used again
@pytest.mark.parametrize("with_states", [True, False])
def test_sixteen_bits(dtype, size, with_states):
    """The same as under a transform, and so do the derivatives of a gradient's square."""
    T, B, I, H = size
    module = fastlstm.LSTM(I, H, backend="numba").to(dtype)
    x, h_0, c_0 = (torch.randn(*s).to(dtype).requires_grad_() for s in ((T, B, I), (1, B, H), (1, B, H)))
    states = [h_0, c_0] if with_states else []
    inputs, names = [x, *states, *module.parameters()], list(dict(module.named_parameters()))
    output, ends = module(x, tuple(states) or None)
    got = [output, *ends]
    gradients = torch.autograd.grad(got, inputs, directions(got), create_graph=T < 90)
    got += gradients
    if T < 90:
        got += torch.autograd.grad(length(gradients), inputs)
    want = by_transforms(function_of(module, names, with_states), inputs, twice=T < 90)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == dtype
        # a bit of 16 may round the other way, and a second derivative sums over many that do
        close(a, b, "long")


@pytest.mark.parametrize("dtype", [torch.double, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"lengths": True}, {"reset": True}, {"bidirectional": True, "lengths": True}, {"layers": 2}]
)
def test_masks_directions_and_layers(dtype, options, calls):
    """First and second derivatives are those of a call under transforms."""
    T, B, I, H = 6, 4, 5, 7
    layers, bidirectional = options.get("layers", 1), options.get("bidirectional", False)
    module = fastlstm.LSTM(I, H, layers, bidirectional=bidirectional, backend="numba").to(dtype)
    x = torch.randn(T, B, I).to(dtype).requires_grad_()
    given = {}
    if "lengths" in options:
        given["lengths"] = torch.tensor([6, 0, 3, 5])
    if "reset" in options:
        given["reset"] = torch.rand(T, B) < 0.3
    inputs, names = [x, *module.parameters()], list(dict(module.named_parameters()))
    output, states = module(x, **given)
    parts = layers * (2 if bidirectional else 1)
    assert calls.count("forward") == (1 if dtype is torch.double else parts)  # of 16 bits each runs by itself
    got = [output, *states]
    gradients = torch.autograd.grad(got, inputs, directions(got), create_graph=True)
    got += [*gradients, *torch.autograd.grad(length(gradients), inputs)]
    run = function_of(module, names, False)
    want = by_transforms(lambda *inputs: run(*inputs, **given), inputs, twice=True)
    close(got, want, "long")  # a sum of biases is taken otherwise


def double(T, B, I, H, **options):
    module = fastlstm.LSTM(I, H, backend="numba", **options).double()
    x, h_0, c_0 = (torch.randn(*s, dtype=torch.double) for s in ((T, B, I), (1, B, H), (1, B, H)))
    return module, [a.requires_grad_() for a in (x, h_0, c_0)]


def test_a_direction_given_after_the_forward_pass():
    """Reverse mode recorded first, forward mode over it: a Hessian-vector product."""
    module, (x, h_0, c_0) = double(4, 2, 3, 5)
    direction = torch.randn_like(x)
    (first,) = torch.autograd.grad(module(x, (h_0, c_0))[0].square().sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(first, x, direction)
    with forward_ad.dual_level():
        outputs = module(x, (h_0, c_0))[0]
        dual = forward_ad.make_dual(x, direction)
        (gradient,) = torch.autograd.grad(module(dual, (h_0, c_0))[0].square().sum(), dual, create_graph=True)
        torch.testing.assert_close(forward_ad.unpack_dual(gradient).tangent, want)
        assert torch.equal(outputs, module(x, (h_0, c_0))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU, fastlstm.Elman])
def test_a_checkpoint_of_it(kind, dtype, T, reentrant):
    module, x = kind(5, 7, num_layers=2, backend="numba").to(dtype), torch.randn(T, 3, 5).to(dtype).requires_grad_()
    want = torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
    for _ in range(2):
        checkpoint(module, x, use_reentrant=reentrant)[0].sum().backward()
        for a, b in zip([x, *module.parameters()], want):
            assert torch.equal(a.grad, b)
            a.grad = None
