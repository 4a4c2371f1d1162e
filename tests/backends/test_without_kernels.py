"""A CPU on which neither numba nor the native library can be used: `auto` takes torch's own LSTM, and says why."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import fastlstm
from fastlstm.backends import csrc, dispatch
from fastlstm.cells import library
from tests.helpers.modules import REFERENCE, pair
from tests.helpers.tolerances import close

DEVICE = torch.device("cpu")


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(dispatch.module("numba"), "_INSTALLED", False)
    monkeypatch.setattr(csrc, "reason", "the native backend's library is not there")
    monkeypatch.setattr(dispatch, "_warned", {"cpu"})  # the warning has a test of its own


def taken(**options):
    options = {"cell": library.lstm, "masked": False, "inner_states": False} | options
    return dispatch.choose("auto", DEVICE, torch.float32, **options)


def test_the_ladder(without_kernels):
    assert taken() == "aten"
    assert taken(cell=library.lstm_projected) == "aten"
    for lacking in ("masked", "inner_states", "transformed", "traced"):
        assert taken(**{lacking: True}) == "reference"
    assert taken(cell=library.lstm_projected, transformed=True) == "reference"
    assert not dispatch.traits(taken()).plans


def first(lstm, x):
    return lstm(x)[0]


def tangent_of_a_dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS = {
    "vmap": lambda f, x: vmap(f, 1, 1)(x.unsqueeze(2)),
    "grad": lambda f, x: grad(lambda x: f(x).pow(2).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x,))[1],
    "dual numbers": tangent_of_a_dual,
    "jacrev": lambda f, x: jacrev(lambda x: f(x).sum(0))(x),
    "jacfwd": lambda f, x: jacfwd(lambda x: f(x).sum(0))(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).pow(2).sum())(x),
    "per sample": lambda f, x: vmap(grad(lambda x: f(x).pow(2).sum()), 1, 1)(x.unsqueeze(2)),
    "second derivatives": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).pow(2).sum(), x),
    "batched gradients": lambda f, x: torch.autograd.functional.jacobian(lambda x: f(x).sum(0), x, vectorize=True),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("options", [{}, {"proj_size": 2}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(without_kernels, transform, frozen, options):
    x = torch.randn(5, 2, 3, dtype=torch.double)
    modules = pair(3, 4, like=REFERENCE, **options)
    want, got = (TRANSFORMS[transform](partial(first, m.requires_grad_(not frozen)), x) for m in modules)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("needs_input", [False, True])
def test_compiled_training(without_kernels, needs_input):
    """Without a node for each step, and at other sizes without a second compilation."""
    eager, lstm = pair(3, 4, like=REFERENCE, exact=torch.float32, dtype=torch.float32)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True, dynamic=True)
    for T in (5, 9):
        x = torch.randn(T, 2, 3, requires_grad=needs_input)
        got, want = compiled(x)[0], eager(x)[0]
        torch.testing.assert_close(got, want)
        direction = torch.randn_like(want)
        gradients = (torch.autograd.grad(a, list(m.parameters()), direction) for a, m in ((got, lstm), (want, eager)))
        close(*gradients, "sums")


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_an_open_length(without_kernels, strict):
    eager, lstm = pair(3, 4, like=REFERENCE)
    sizes = {"input": {0: torch.export.Dim("T", max=1000), 1: torch.export.Dim("B", max=1000)}}
    with torch.no_grad():
        example = torch.randn(5, 2, 3, dtype=torch.double)
        program = torch.export.export(lstm, (example,), dynamic_shapes=sizes, strict=strict)
        x = torch.randn(8, 3, 3, dtype=torch.double)
        torch.testing.assert_close(program.module()(x)[0], eager(x)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(without_kernels, dtype):
    twin, lstm = pair(3, 4, like=REFERENCE, exact=dtype, dtype=dtype)
    x = torch.randn(5, 2, 3).to(dtype).requires_grad_()
    bound = 4 * torch.finfo(dtype).eps  # of values below 1, rounded once or twice a step
    got, want = lstm(x)[0], twin(x)[0]
    assert (got - want).abs().max() < bound
    gradients = (torch.autograd.grad(y.sum(), x)[0] for y in (got, want))
    torch.testing.assert_close(*gradients, rtol=0, atol=bound)


def test_complex_numbers_are_no_fault_of_the_installation(monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "_warned", set())
    lstm, x = fastlstm.LSTM(3, 4, dtype=torch.complex64), torch.randn(5, 2, 3, dtype=torch.complex64)
    torch.testing.assert_close(lstm(x)[0], lstm.to_torch()(x)[0])
    assert not [warning for warning in recwarn if "auto takes" in str(warning.message)]
