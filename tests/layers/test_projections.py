"""LSTMs with a projection: h has P units, and c has H.

The truth is `torch.nn.LSTM` with proj_size in float64, and with lengths or resets the backend `reference`, which other
tests compare with it. Sizes are such that P and H fill whole vectors, or parts of one or of several.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import fastlstm
from tests.helpers.modules import REFERENCE, pair, same
from tests.helpers.threads import on_any_split, split, splits
from tests.helpers.tolerances import F32, F64, close

SIZES = [(7, 1), (7, 3), (64, 32), (100, 30), (650, 64)]
SHAPES = [(4, 1, 5), (1, 67, 3), (3, 67, 200), (9, 5, 3)]
OPTIONS = [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}]


def operands_of(module, T, B):
    """x and the initial states."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (T, B, module.input_size), (count, B, module.proj_size), (count, B, module.hidden_size)
    return [torch.randn(size) for size in sizes]


def results(module, operands, masks, directions):
    """The output and the last states, and the gradients of all operands and weights."""
    to = next(module.parameters()).dtype
    x, *states = leaves = [a.to(to).requires_grad_() for a in operands]
    output, last = module(x, tuple(states), **masks)
    given = [a.to(to) for a in directions]
    return [output, *last], torch.autograd.grad([output, *last], [*leaves, *module.parameters()], given)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(SIZES), st.sampled_from(SHAPES), st.sampled_from(OPTIONS),
    st.sampled_from(["", "lengths", "reset"]), st.sampled_from([F32, F64]), splits,
)  # fmt: skip
@on_any_split
def test_outputs_and_gradients(size, shape, options, kind, dtype):
    (H, P), (T, B, I) = size, shape
    if kind == "reset" and "bidirectional" in options:
        kind = "lengths"
    masks = {"lengths": {"lengths": torch.randint(0, T + 1, (B,))}, "reset": {"reset": torch.rand(T, B) < 0.3}}
    like = {"like": REFERENCE} if kind else {}
    exact, module = pair(I, H, proj_size=P, dtype=dtype, backend="numba", **like, **options)
    module = module.to(dtype)
    exact.load_state_dict(module.state_dict())
    operands = operands_of(module, T, B)
    D, count = 2 if module.bidirectional else 1, len(operands[1])
    directions = [torch.randn(size) for size in ((T, B, D * P), (count, B, P), (count, B, H))]
    given_masks = masks.get(kind, {})
    (got, found), (want, truth) = (results(m, operands, given_masks, directions) for m in (module, exact))
    close(got, want, "sums")
    close(found, truth, "gradients")
    with torch.no_grad():
        output, last = module(operands[0].to(dtype), tuple(a.to(dtype) for a in operands[1:]), **given_masks)
    assert same([output, *last], got)


@pytest.mark.parametrize(("H", "P"), [(7, 3), (100, 30), (256, 128)])
def test_bits_depend_on_neither_threads_nor_rows(poisoned, H, P):
    """Those of a module, of a row alone, of single steps and of a stream."""
    T, B = 5, 9
    x, of_splits = torch.randn(T, B, 6), []
    for teams, members in ((1, 1), (2, 1), (1, 2), (2, 2)):
        with split(teams, members):
            torch.manual_seed(0)
            module = fastlstm.LSTM(6, H, 2, proj_size=P, backend="numba")
            operands = [x, torch.zeros(2, B, P), torch.zeros(2, B, H)]
            of_splits.append(results(module, operands, {}, [torch.ones(T, B, P), *operands[1:]]))
    assert all(same([*got, *found], [*of_splits[0][0], *of_splits[0][1]]) for got, found in of_splits[1:])
    with torch.no_grad():
        output, _ = module(x)
        assert torch.equal(module(x[:, 3:4])[0], output[:, 3:4])
        state, own, stream = None, None, module.stream(B)
        for t in range(T):
            h, state = module.step(x[t], state)
            of_own, own = stream.step(x[t], own)
            assert same([h, of_own, stream(x[t])], [output[t]] * 3)
        assert same([*state, *own], [*stream.state] * 2)


def test_second_derivatives():
    module = fastlstm.LSTM(2, 3, proj_size=2, backend="numba", dtype=F64)
    operands = [a.to(F64).requires_grad_() for a in operands_of(module, 3, 2)]
    names, weights = zip(*module.named_parameters())

    def call(x, h_0, c_0, *weights):
        output, last = functional_call(module, dict(zip(names, weights)), (x, (h_0, c_0)))
        return output, *last

    assert gradgradcheck(call, (*operands, *weights))


TRANSFORMS = {
    "forward mode": lambda f, x, weights: jvp(f, (x, weights), (x, weights))[1],
    "gradients of each sample": lambda f, x, weights: vmap(grad(lambda w, x: f(x, w).pow(2).sum()), (None, 1))(
        weights, x.unsqueeze(2)
    ),
    "several models": lambda f, x, weights: vmap(lambda scale: f(x, {k: scale * a for k, a in weights.items()}))(
        torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    ),
    "compiled": lambda f, x, weights: torch.compile(f, backend="aot_eager", fullgraph=True)(x, weights),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform):
    exact, module = pair(3, 7, proj_size=4, like=REFERENCE, backend="numba")
    x = torch.randn(5, 4, 3, dtype=F64)
    results = []
    for each in (module, exact):
        weights = {k: a.detach() for k, a in each.named_parameters()}
        results.append(TRANSFORMS[transform](lambda x, w, m=each: functional_call(m, w, (x,))[0], x, weights))
    got, want = (list(a.values()) if isinstance(a, dict) else [a] for a in results)
    close(got, want, "derivatives")


def test_all_cell_states():
    exact, module = pair(3, 7, proj_size=4, like=REFERENCE, backend="numba")
    x = torch.randn(5, 4, 3, dtype=F64)
    close(module(x, return_cells=True)[2], exact(x, return_cells=True)[2], "values")
