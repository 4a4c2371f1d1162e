"""A training step a call of 16-bit weights: packed in float32 from step to step, and whatever changes them is seen."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlstm
from fastlstm.backends import dispatch
from fastlstm.cells import library
from tests.helpers.calls import CPU, Calls

dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
cells = pytest.mark.parametrize("cell", [False, True])


def module_of(cell, I, H, dtype, **options):
    return (fastlstm.LSTMCell if cell else fastlstm.LSTM)(I, H, dtype=dtype, backend="numba", **options)


def step(module, x, state):
    """Outputs and every gradient of one step; `x` (B, I), states (B, H) or None for zeros."""
    leaves = [a.clone().requires_grad_() for a in (x, *(state or ()))]
    hx = tuple(leaves[1:]) or None
    if isinstance(module, fastlstm.LSTM):
        _, (h, c) = module(leaves[0].unsqueeze(0), hx and tuple(a.unsqueeze(0) for a in hx))
    else:
        h, c = module(leaves[0], hx)
    loss = (h.float() * torch.linspace(-1, 1, h.shape[-1])).sum() + c.float().square().sum()
    return h, c, *torch.autograd.grad(loss, [*leaves, *module.parameters()])


def same(got, want):
    return len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want))


@dtypes
@cells
@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([1, 7, 40]), st.sampled_from([1, 7, 66]), st.sampled_from([1, 7, 33, 100]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_steps_between_updates_are_those_of_fresh_weights(dtype, cell, B, I, H, bias, given_states):
    """Bit for bit: what is packed is what would be packed again."""
    module = module_of(cell, I, H, dtype, bias=bias)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    state = tuple(torch.randn(2, B, H).to(dtype)) if given_states else None
    for k in range(4):
        x = torch.randn(B, I).to(dtype)
        assert same(step(module, x, state), step(deepcopy(module), x, state))
        if k == 1:
            for p, g in zip(module.parameters(), step(module, x, state)[-len(list(module.parameters())) :]):
                p.grad = g
            optimizer.step()


@dtypes
@cells
def test_nothing_is_packed_again(dtype, cell, monkeypatch):
    options = {"cell": library.lstm, "projected": False, "masked": False, "cells": False}
    if dispatch.choose("numba", torch.device("cpu"), dtype, **options) != "numba":
        pytest.skip("bfloat16 is multiplied as it is here, and packed at every step")
    calls = Calls(monkeypatch, *CPU)
    module, x, state = module_of(cell, 30, 40, dtype), torch.randn(2, 30).to(dtype), torch.randn(2, 2, 40).to(dtype)
    for _ in range(4):
        step(module, x, tuple(state))
    assert calls.count("pack") == 2  # for the forward pass, and transposed


@pytest.mark.sampled(3)
@dtypes
@cells
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_single_element_written_past_the_version_counter(dtype, cell, name, data):
    module, x, state = module_of(cell, 29, 151, dtype), torch.randn(2, 29).to(dtype), torch.randn(2, 2, 151).to(dtype)
    flat = getattr(module, name if cell else name + "_l0").data.view(-1)
    step(module, x, tuple(state))
    flat[data.draw(st.integers(0, len(flat) - 1))] += 0.5
    for _ in range(2):
        assert same(step(module, x, tuple(state)), step(deepcopy(module), x, tuple(state)))


@dtypes
def test_an_update_between_the_passes_is_refused(dtype):
    module, x = module_of(False, 5, 6, dtype), torch.randn(1, 2, 5).to(dtype)
    h = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@dtypes
def test_a_second_derivative_of_a_step(dtype):
    """From the 16-bit weights themselves. Of values below 1: a few roundings of float16's."""
    module, x = module_of(False, 5, 6, dtype), torch.randn(1, 2, 5).to(dtype)
    exact, results = deepcopy(module).double(), []
    for each, a in ((module, x), (module, x), (exact, x.double())):
        a = a.clone().requires_grad_()
        (first,) = torch.autograd.grad(each(a)[0].sum(), a, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), a)[0].double())
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@dtypes
def test_weights_made_in_inference_mode_are_refused_as_in_float32(dtype):
    with torch.inference_mode():
        module = module_of(False, 5, 6, dtype)
    x = torch.randn(1, 2, 5).to(dtype).requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(x)
