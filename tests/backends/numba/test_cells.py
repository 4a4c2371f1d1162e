"""Layers of every cell, of the library's and of drawn ones, on the kernels that were written for any."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlstm.backends.numba as numba
from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends.base import Gradients, Layer, Run
from tests.cells.drawn import QUIET, declared, sources
from tests.cells.functions import OF_TORCH
from tests.cells.layers import GRADIENTS, OUTPUTS, error, every_cell, masks
from tests.helpers.layers import Case, flat, stacked
from tests.helpers.threads import on_any_split, split, splits
from tests.helpers.tolerances import F32, F64, KINDS, close

LIMIT = {F64: (OUTPUTS, GRADIENTS), F32: (KINDS["layer"].bounds[F32],) * 2}
# T, B, I, H: a lone row, few and many rows, chunks; x narrow and wide; last panels that are full, cut off, or alone
SIZES = [
    (4, 1, 3, 16), (3, 1, 40, 7), (5, 2, 1, 1), (3, 33, 20, 7), (2, 65, 5, 20), (9, 3, 50, 33), (3, 2, 4, 100),
]  # fmt: skip


def to(record: Run, dtype: torch.dtype) -> Run:
    """Gradients of a run's results in another type."""
    h, last, kept = (a if isinstance(a, tuple) else (a,) for a in record)
    h, last, kept = (tuple(None if a is None else a.to(dtype) for a in each) for each in (h, last, kept))
    return Run(h[0], last, kept)


def on_kernels(layer: Layer, grads: Run, needs: Gradients) -> list[torch.Tensor | None]:
    """All results and gradients."""
    run = numba.forward(layer, True)
    return [*flat(run), *numba.backward(grads, layer, run, needs).flat]


def on_threads(teams: int, members: int, *arguments: Any) -> list[torch.Tensor | None]:
    """The same on so many teams of so many threads."""
    with split(teams, members):
        return on_kernels(*arguments)


def check(case: Case, dtype: torch.dtype, needs: Gradients | None = None) -> None:
    """Compare with plain PyTorch in float64, and with a team of two threads."""
    needs, layer = needs or case.needs, case.layer
    given, grads = layer.to(dtype), to(case.grads, dtype)
    want = reference.forward(layer, True)
    expected = [*flat(want), *reference.backward(to(grads, F64), layer, want, needs).flat]
    one, two = on_kernels(given, grads, needs), on_threads(1, 2, given, grads, needs)
    for k, (got, other, exact) in enumerate(zip(one, two, expected, strict=True)):
        assert (got is None) == (exact is None), k
        if got is not None:
            assert torch.equal(got, other), k
            assert error(got.double(), exact) < LIMIT[dtype][k >= len(flat(case.grads))], k


@every_cell
@masks
def test_stacks(cell, masked):
    """A stack of layers is each of them, to the bit."""
    parts = [Case(cell, 4, 3, 6, 7, masked=masked, seed=seed) for seed in range(3)]
    stack, incoming = stacked(parts)
    for threads in (1, 2):
        got = on_threads(threads, 1, stack, incoming, parts[0].needs)
        each = [on_kernels(case.layer, case.grads, case.needs) for case in parts]
        for found, wanted in zip(got, zip(*each), strict=True):
            if found is not None:
                cut = found.dim() == wanted[0].dim() + 1
                axis = 1 if found.dim() > 2 or cut else 0
                expected = torch.stack(wanted) if cut else torch.cat(wanted, axis)
                assert torch.equal(found, expected)


@given(sources(), st.sampled_from(SIZES), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99), splits)
@settings(max_examples=12, **QUIET)
@on_any_split
def test_drawn_cells(source, size, reverse, masked, zeros, seed):
    check(Case(declared(source), *size, reverse, masked, zeros, seed=seed), F64)


@pytest.mark.slow
@given(sources(), st.sampled_from(SIZES), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99), splits)
@settings(max_examples=150, **QUIET)
@on_any_split
def test_many_drawn_cells(source, size, reverse, masked, zeros, seed):
    check(Case(declared(source), *size, reverse, masked, zeros, seed=seed), F64)


# The bounds of the fits, in float32 1.9e-7 and 1.3e-7
TIGHT = {("sigmoid", F32): 2e-7, ("tanh", F32): 1.5e-7, ("sigmoid", F64): 4e-16, ("tanh", F64): 4e-16}


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize(("dtype", "bound"), [(F32, 4e-7), (F64, 1e-15)])
def test_functions(name, dtype, bound):
    """Of all numbers that there are, to a few roundings of each: sigmoid's and tanh's are relative to one."""
    function, _ = OF_TORCH[name]

    @cells.cell(gates={"a": "x"}, states=("h",))
    def applied(a):
        return function(a)

    ends = [math.inf, -math.inf, math.nan, 0.0, 0.25, 1.0, -1.0]
    ends += [88.7, 88.8, -87.3, -103.0, -110.0, 709.7, 709.8, -745.0]  # where exp's results end, in either type
    x = torch.cat([torch.tensor(ends, dtype=dtype), torch.linspace(-120, 120, 50_001, dtype=dtype)])
    x = torch.cat([x, torch.logspace(-30, 2, 4096, dtype=dtype), -torch.logspace(-30, 0, 4096, dtype=dtype)])
    weights = torch.ones(1, 1, dtype=dtype), None, None, None
    got = numba.forward(Layer(x.view(-1, 1, 1), weights, (None,), None, None, False, applied), False).h.flatten()
    want = applied(x.double())
    assert torch.equal(got.isnan(), want.isnan())
    least = 1.0 if name in ("sigmoid", "tanh") else torch.finfo(dtype).tiny * 2
    finite = want.abs() <= torch.finfo(dtype).max
    exact = (~finite | x.isinf()) & ~want.isnan()
    assert torch.equal(got[exact], want[exact].to(dtype))
    difference = (got.double() - want)[finite].abs() / want[finite].abs().clamp(min=least)
    assert difference.max() < TIGHT.get((name, dtype), bound)
    if name in ("sigmoid", "tanh"):
        assert got.nan_to_num().abs().max() <= 1
        assert name == "tanh" or got.nan_to_num().min() >= 0
    if name == "tanh":  # relative where a gradient must survive
        small = (x.abs() < 1e-2) & (x != 0)
        assert ((got.double() - want)[small] / want[small]).abs().max() < 3 * TIGHT[name, dtype]


def test_cells_of_one_name():
    """Their code is kept by what it is, not by its name."""

    def named(factor):
        @cells.cell(gates={"a": "xh"}, states=("h",))
        def same(a):
            return factor * cells.tanh(a)

        return same

    layer = Case(named(0.5), 3, 2, 4, 5).layer
    for factor in (0.5, 0.25):
        of_factor = layer._replace(cell=named(factor))
        close(numba.forward(of_factor, False).h, reference.forward(of_factor, False).h, "values")


@cells.cell(gates={"a": "xh"}, states=("h",), params=("row0", "sum0", "kept0"), inputs=("_head0",))
def of_names_of_phases(a, h, row0, sum0, kept0, _head0):
    a = cells.layer_norm(a * row0)
    return cells.tanh(a * sum0 * kept0 + cells.mean(h * _head0, of="head"))


def test_names_may_be_those_that_phases_use():
    check(Case(of_names_of_phases, 3, 5, 4, 20), F32)
