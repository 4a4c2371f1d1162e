"""Derivatives, vmap and autograd inside each other, of a layer of any cell: they give what plain PyTorch gives for a
loop over the steps that authors write.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tests.helpers.cases import CELLS, DRAWS, Case, cases, largest_error
from tests.helpers.layers import BACKENDS
from tests.helpers.rnn import loop
from tests.helpers.threads import on_any_split, splits
from tests.helpers.tolerances import F32, F64
from tests.helpers.transforms import TRITON


def call_of(case, run):
    """`run` of the case's layers as a function of floats and masks, which returns the output and the last states."""

    def call(floats, masks):
        states = floats.get("states")
        hx = states[0] if states is not None and len(states) == 1 else states
        options = masks | ({"inputs": floats["inputs"]} if floats["inputs"] else {})
        output, last = run(floats["weights"], floats.get("x"), hx, **options)
        return output, *(last if isinstance(last, tuple) else (last,))

    return call


def floats_of(case, module, has_nan):
    """What a module may have gradients for, with padding of NaN or of zeros."""
    parameters = dict(module.named_parameters())
    dtype = next(iter(parameters.values()), torch.empty(0, dtype=F64)).dtype
    x, *others = [a if a is None or has_nan else a.nan_to_num() for a in case.values]
    count = len(case.cell.states)
    floats = {"weights": {name: a.detach() for name, a in parameters.items()}}
    floats["inputs"] = dict(zip(case.cell.inputs, others[count:]))
    floats |= ({} if x is None else {"x": x}) | ({} if case.zeros else {"states": tuple(others[:count])})
    return tree_map(lambda a: a.to(dtype), floats)


def by_module(module):
    return lambda weights, *arguments, **options: functional_call(module, weights, arguments, options)


def by_loop(module):
    layers = {name: getattr(module, name, 1) for name in ("num_layers", "bidirectional", "heads", "_cell")}

    def run(weights, x, hx, **options):
        states = hx if hx is None or isinstance(hx, tuple) else (hx,)
        return loop(SimpleNamespace(**layers, **weights), x, states, **options)

    return run


# Steps, each of which makes a function of floats and masks from another one


def loss_of(f):
    return lambda floats, masks: sum(a.sin().sum() for a in tree_leaves(f(floats, masks)))


def tangents_of(floats):
    return tree_map(lambda a: a.nan_to_num().cos(), floats)


def mapped(f, axes):
    return lambda floats, masks: vmap(f, axes)(floats, masks)


STEPS = {
    "grad": lambda f: grad(loss_of(f)),
    "jvp": lambda f: lambda floats, masks: jvp(lambda a: f(a, masks), (floats,), (tangents_of(floats),))[1],
    # of which only what comes in from above, or the tangents, are batched
    "rows of a Jacobian": lambda f: lambda floats, masks: rows_of_jacobian(lambda a: f(a, masks), floats),
    "columns of a Jacobian": lambda f: (
        lambda floats, masks: vmap(
            lambda scale: jvp(lambda a: f(a, masks), (floats,), (tangents_of(tree_map(lambda a: scale * a, floats)),))[
                1
            ]
        )(torch.tensor([1.0, -0.5], dtype=tree_leaves(floats)[0].dtype))
    ),
}


def rows_of_jacobian(f, floats):
    """A vjp that is called once its level is gone."""
    ends, pull = vjp(f, floats)
    directions = tree_map(lambda a: torch.stack((a.detach().cos(), torch.ones_like(a))), ends)
    return vmap(lambda d: pull(d)[0])(directions)


# What ordinary autograd makes of such a function


def by_autograd(f, floats, masks):
    ends, wanted = tree_leaves(f(floats, masks)), tree_leaves(floats)
    return [*ends, *torch.autograd.grad(sum(a.sin().sum() for a in ends), wanted, materialize_grads=True)]


def by_autograd_twice(f, floats, masks):
    """The gradients, and those of their length."""
    loss, wanted = loss_of(f)(floats, masks), tree_leaves(floats)
    first = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
    length = sum(a.pow(2).sum() for a in first)
    return [*first, *torch.autograd.grad(length, wanted, materialize_grads=True)]


def by_batched_autograd(f, floats, masks):
    loss, wanted = loss_of(f)(floats, masks), tree_leaves(floats)
    directions = torch.tensor([1.0, -2.0]).to(loss)
    rows = torch.autograd.grad(loss, wanted, directions, is_grads_batched=True, allow_unused=True)
    return [a.new_zeros(2, *a.shape) if row is None else row for row, a in zip(rows, wanted)]


def by_dual_numbers(f, floats, masks):
    """The tangents, and the gradients of their sum."""
    wanted = tree_leaves(floats)
    with forward_ad.dual_level():
        duals = tree_map(forward_ad.make_dual, floats, tangents_of(tree_map(torch.Tensor.detach, floats)))
        parts = map(forward_ad.unpack_dual, tree_leaves(f(duals, masks)))
        tangents = [part.primal if part.tangent is None else part.tangent for part in parts]
        loss = sum(a.sin().sum() for a in tangents)
        return [*tangents, *torch.autograd.grad(loss, wanted, materialize_grads=True)]


def by_dual_directions(f, floats, masks):
    """Tangents that only a backward pass meets: it is linear in the incoming gradient."""
    ends, wanted = tree_leaves(f(floats, masks)), tree_leaves(floats)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a.detach().sin(), a.detach().cos()) for a in ends]
        gradients = torch.autograd.grad(ends, wanted, duals, materialize_grads=True)
        tangents = [forward_ad.unpack_dual(a).tangent for a in gradients]
        return [torch.zeros_like(a) if t is None else t for t, a in zip(tangents, wanted)]


AROUND = {
    "nothing": lambda f, floats, masks: f(floats, masks),
    "autograd": by_autograd,
    "autograd twice": by_autograd_twice,
    "batched autograd": by_batched_autograd,
    "dual numbers": by_dual_numbers,
    "dual directions": by_dual_directions,
}


def check(case, steps, around, bound, is_enabled=True):
    """The same of the case's module and of a loop, which runs in float64. Each step is a name of `STEPS`, or for vmap
    the axis of each float and mask, or None.
    """
    operations = case.cell.derived().forward.operations()
    has_both_means = case.heads > 1 and {"mean", "mean_of_head"} <= operations.keys()  # of which a function takes one
    truth = by_module(case.exact) if case.name not in CELLS or has_both_means else by_loop(case.exact)
    results = []
    for module, run in ((case.module, by_module(case.module)), (case.exact, truth)):
        # a loop multiplies padding with zeros; and what vmap batches has other lengths
        has_nan = module is case.module and all(isinstance(step, str) for step in steps)
        f, floats = call_of(case, run), floats_of(case, module, has_nan)
        masks = case.masks
        for step in steps:
            if isinstance(step, str):
                f = STEPS[step](f)
                continue
            leaves, spec = tree_flatten((floats, masks))
            axes = [axis for axis, _ in zip(itertools.cycle(step), leaves)]
            axes = axes if axes.count(None) < len(axes) else [0] * len(axes)
            leaves = [a if k is None else batch_of(a, k) for a, k in zip(leaves, axes)]
            f, (floats, masks) = mapped(f, tree_unflatten(axes, spec)), tree_unflatten(leaves, spec)
        floats = tree_map(lambda a: a.clone().requires_grad_(around != "nothing"), floats)
        with torch.set_grad_enabled(is_enabled or around != "nothing"):
            results.append([a.detach() for a in tree_leaves(AROUND[around](f, floats, masks))])
    assert all(a.isfinite().all() for a in results[1])
    assert largest_error(*results) < bound


def batch_of(a, axis):
    """Three of a tensor, which differ."""
    several = [a, a.roll(1, -1), a.flip(-1)] if not a.is_floating_point() else [a, 0.5 * a, 0.75 * a.flip(0)]
    return torch.stack(several, axis)


FORWARD = "jvp", "columns of a Jacobian"
AXES = st.lists(st.sampled_from([0, 0, None, -1]), min_size=12, max_size=12)  # of tensors in turns


PLAIN = {"batch_first": st.just(False), "every": st.just(False)}


@st.composite
def transforms(draw):
    """What `check` takes beside a case and a bound."""
    around = draw(st.sampled_from(list(AROUND)))
    steps = [name for name in STEPS if around != "dual numbers" or name not in FORWARD]  # torch nests no levels of both
    longest = 3 if around == "nothing" else 2
    return draw(st.lists(st.sampled_from(steps) | AXES, max_size=longest)), around, draw(st.booleans())


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_any_transform_of_any_cell(backend, data):
    size = st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 4))
    case = data.draw(cases(backend, (F64,), size=size, **PLAIN))
    steps, around, is_enabled = data.draw(transforms())
    check(case, steps, around, 1e-11, is_enabled)


@settings(max_examples=40, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_stacks_of_any_size(data):
    """Layers that vmap has stacked run in one call, of samples, of models or of both."""
    check(data.draw(cases("numba", (F64,), **PLAIN)), [data.draw(AXES)], "autograd", 1e-11)


EACH, MODELS = [0] * 12, [0] * 4 + [None] * 8
# Steps, what is around them, the mask and B, of those that kernels of their own or of stacks run
IN_FLOAT32 = [
    ([EACH], "autograd", "lengths+reset", 3),
    ([MODELS, "jvp"], "nothing", "", 2),
    (["grad", MODELS], "nothing", "", 0),
    (["jvp", "columns of a Jacobian"], "nothing", "", 2),
    ([], "dual numbers", "", 2),
    ([], "dual directions", "", 2),
]
MORE_IN_FLOAT32 = [
    (["grad", EACH, MODELS], "nothing", "", 2),
    (["rows of a Jacobian", "grad"], "nothing", "lengths", 2),
    (["grad", "grad"], "autograd", "lengths+reset", 1),
    ([MODELS], "autograd twice", "", 2),
    ([], "batched autograd", "", 2),
]


@pytest.mark.parametrize(
    ("steps", "around", "mask", "B"),
    [*IN_FLOAT32, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_IN_FLOAT32)],
)
@pytest.mark.parametrize("backend", ["numba", TRITON], indirect=True)
def test_transforms_in_float32(backend, steps, around, mask, B):
    """Of sums of both signs, one for each derivative, of products of 22 bits."""
    check(Case("lstm", (3, B, 4, 5), mask=mask, dtype=F32, backend=backend), steps, around, 3e-5)
