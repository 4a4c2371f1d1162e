"""Transforms of torch.func inside each other, and inside ordinary autograd."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils import _pytree as pytree

import fastlstm
from tests.helpers.tolerances import close

MODELS = 3


def loss(lstm: fastlstm.LSTM, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    output, (_, c_n) = functional_call(lstm, parameters, (x,))
    return output.sin().sum() + c_n.pow(2).sum()


def one_penalty(lstm, parameters, x):
    """The gradient of a gradient's length."""
    return grad(lambda x: grad(lambda x: loss(lstm, parameters, x))(x).pow(2).sum())(x)


def later(lstm, parameters, x):
    """A vjp called once its level is gone."""
    _, pull = vjp(lambda p: loss(lstm, p, x), parameters)
    return pull(torch.ones(()))


def tangent_of(lstm, parameters, x):
    """By dual numbers, which are no level of functorch's."""
    with forward_ad.dual_level():
        output = functional_call(lstm, parameters, (forward_ad.make_dual(x, x.detach().cos()),))[0]
        return forward_ad.unpack_dual(output.sin().sum()).tangent


CALLS = {
    "grad": lambda lstm, stacked, one, x: grad(lambda p: loss(lstm, p, x))(one),
    "vjp": lambda lstm, stacked, one, x: later(lstm, one, x),
    "jacrev": lambda lstm, stacked, one, x: jacrev(lambda x: functional_call(lstm, one, (x,))[0])(x[:2, :1]),
    "vmap": lambda lstm, stacked, one, x: vmap(lambda p: functional_call(lstm, p, (x,)))(stacked),
    "vmap of nothing batched": lambda lstm, stacked, one, x: vmap(lambda k: k + loss(lstm, one, x))(torch.zeros(2)),
    "vmap of grad": lambda lstm, stacked, one, x: vmap(grad(lambda p: loss(lstm, p, x)))(stacked),
    "vmap of vmap of grad": lambda lstm, stacked, one, x: vmap(
        vmap(grad(lambda p, x: loss(lstm, p, x.unsqueeze(1))), (None, 1)), (0, None)
    )(stacked, x),
    "grad of grad": lambda lstm, stacked, one, x: one_penalty(lstm, one, x),
    "vmap of grad of grad": lambda lstm, stacked, one, x: vmap(lambda p: one_penalty(lstm, p, x))(stacked),
    "grad of vmap": lambda lstm, stacked, one, x: grad(
        lambda s: vmap(lambda p: loss(lstm, p, x))(s).pow(2).sum(),
    )(stacked),
    "grad of jvp": lambda lstm, stacked, one, x: grad(lambda x: jvp(lambda x: loss(lstm, one, x), (x,), (x.cos(),))[1])(
        x
    ),
    "grad of a tangent": lambda lstm, stacked, one, x: grad(lambda x: tangent_of(lstm, one, x))(x),
    "hessian": lambda lstm, stacked, one, x: hessian(lambda x: loss(lstm, one, x))(x[:2, :1]),
}


@pytest.fixture(scope="module")
def arguments():
    lstms = [fastlstm.LSTM(3, 5, dtype=torch.float64) for _ in range(MODELS)]
    stacked = {k: v.detach() for k, v in stack_module_state(lstms)[0].items()}
    return lstms[0], stacked, {k: v[0] for k, v in stacked.items()}, torch.randn(4, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("enabled", [True, False])
def test_levels_of_kernels_and_of_plain_pytorch(arguments, name, enabled):
    lstm, *tensors = arguments
    plain = fastlstm.LSTM(3, 5, dtype=torch.float64, backend="reference")
    with torch.set_grad_enabled(enabled):
        got, want = (pytree.tree_leaves(CALLS[name](module, *tensors)) for module in (lstm, plain))
    close(got, want, "derivatives")


def test_an_outer_graph_reaches_through_the_levels(arguments):
    """Ordinary autograd around `vmap`: the parameters have gradients, as in training an ensemble."""
    lstm, stacked, _, x = arguments
    leaves = {k: v.clone().requires_grad_() for k, v in stacked.items()}
    together = vmap(lambda p: loss(lstm, p, x))(leaves)
    got = torch.autograd.grad(together.sum(), list(leaves.values()))
    for k in range(MODELS):
        one = {name: v.detach()[k].requires_grad_() for name, v in leaves.items()}
        want = torch.autograd.grad(loss(lstm, one, x), list(one.values()))
        for a, b in zip(got, want):
            close(a[k], b, "sums")
