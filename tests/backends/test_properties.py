"""What holds for a layer of every cell on every backend of a CPU, whatever its sizes, masks, directions and threads."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlstm
from tests.helpers.cases import DRAWS, SIZES, cases, jumps, largest_error
from tests.helpers.layers import UNAVAILABLE, needs_native
from tests.helpers.modules import flat, same
from tests.helpers.numba import needs_pieces, needs_unit
from tests.helpers.threads import on_any_split, split, splits
from tests.helpers.tolerances import BF16, F16, F32, F64

BACKENDS = {
    "numba": (),
    "native": needs_native,
    "numba-bf16": needs_unit,
    "numba-bf16x3": needs_pieces,
    "numba-bf16x6": needs_pieces,
}
each_backend = pytest.mark.parametrize("backend", [pytest.param(name, marks=marks) for name, marks in BACKENDS.items()])
# Of the largest value of a tensor, or of one; gradients may err by twice as much. Of float64 and float32 a hundred
# roundings. A factor of the others keeps 8, 16 or all bits and errs by half of the last one's value, which a step may
# multiply; norms and quotients of small numbers lose up to three bits more. The steps of LSTMs and GRUs have neither,
# and no value above one: a fifth of each is enough for these.
BOUNDS = {F64: 2.3e-14, F32: 1.2e-5, "numba-bf16": 0.1, "numba-bf16x3": 4e-4, "numba-bf16x6": 2e-5}
# Of tensors of 16 bits, whose factors, states and results have 8 or 11 bits.
NARROW_BOUNDS = {BF16: 0.1, F16: 1e-2}
PLAIN = ("lstm", "gru")
many_steps = {
    "size": st.tuples(
        *map(st.sampled_from, ([1, 2, 5, 9, 40, 70], [3, 8, 17, 33, 70], [1, 7, 40, 150], [1, 7, 33, 100]))
    )
}
one_way = {"bidirectional": st.just(False), "mask": st.sampled_from(["", "reset"])}
CELL_MODULES = {"lstm": fastlstm.LSTMCell, "gru": fastlstm.GRUCell, "elman_tanh": fastlstm.ElmanCell}


def dtypes_of(backend, sixteen_bits=False):
    if "bf16" in backend:
        return (F32, BF16) if sixteen_bits and backend == "numba-bf16" else (F32,)
    return (F32, F64, BF16, F16) if sixteen_bits else (F32, F64)


def keeps_errors_small(case):
    """Whether roundings of 8 bits stay within the bounds: norms of some cells multiply them over dozens of steps."""
    return case.T <= 9 or case.name in PLAIN


@each_backend
@settings(max_examples=150, **DRAWS)
@given(data=st.data(), threads=splits)
def test_results_and_gradients(backend, data, threads, poisoned):
    """They are near those of float64, and the same bits in the first call and in the second, which follows a plan; in
    calls without gradients; and on one thread.
    """
    case = data.draw(cases(backend, dtypes_of(backend)))
    with split(*threads):
        outputs, gradients = case.results()
        again = case.results()
        assert same([*again[0], *again[1]], [*outputs, *gradients])
        with torch.no_grad():
            for _ in range(2):  # packs the weights, and finds them packed
                assert same(case.call(case.module)[0], outputs)
    if case.dtype is F64 or (not jumps(case.cell) and ("bf16" not in backend or keeps_errors_small(case))):
        true_outputs, true_gradients = case.results(case.exact)
        bound = BOUNDS.get(backend, BOUNDS[case.dtype]) / (5 if case.name in PLAIN else 1)
        assert largest_error(outputs, true_outputs) < bound
        assert largest_error(gradients, true_gradients) < 2 * bound
    with split(1, 1):
        alone = case.results(copy.deepcopy(case.module))
    assert same([*alone[0], *alone[1]], [*outputs, *gradients])


@pytest.mark.parametrize("backend", ["numba", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [BF16, F16])
@settings(max_examples=200, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_sixteen_bits(backend, dtype, poisoned, data):
    """They are computed in float32 and rounded once, but for products of bfloat16 where the processor has them. On one
    thread they have the same bits.
    """
    case = data.draw(cases(backend, (dtype,)))
    got, gradients = case.results()
    assert {a.dtype for a in (*got, *gradients)} == {dtype}
    with torch.no_grad():
        assert same(case.call(case.module)[0], got)
    with split(1, 1):
        alone = case.results(copy.deepcopy(case.module))
    assert same([*alone[0], *alone[1]], [*got, *gradients])
    if case.name not in PLAIN:
        if not jumps(case.cell) and keeps_errors_small(case):
            want, wanted = case.results(case.exact)
            assert largest_error(got, want) < NARROW_BOUNDS[dtype]
            assert largest_error(gradients, wanted) < 2 * NARROW_BOUNDS[dtype]
        return
    wide = copy.deepcopy(case.module).float()
    if on_unit := backend == "numba" and dtype is BF16 and UNAVAILABLE["numba-bf16"] is None:
        wide.backend = "numba-bf16"
    want, wanted = case.results(wide)
    assert same(got, [a.to(dtype) for a in want])
    if case.bidirectional:  # the gradient of x is a sum of two that are rounded
        gradients, wanted = gradients[1:], wanted[1:]
    if case.name == "gru" and on_unit:
        # The backward pass also reads h outside of products, which is bfloat16 here and float32 there. A rounding of h
        # is 2^-8 of a difference h - n, and may move the factor of a product to its neighbour, by 2^-8. So each term of
        # a sum errs by 2^-7 of its size, which is about 1, and the sum's own rounding adds 2^-8.
        assert largest_error(gradients, wanted) < 2**-6
    else:
        assert same(gradients, [a.to(dtype) for a in wanted])


@each_backend
@settings(max_examples=100, **DRAWS)
@given(data=st.data(), worst=st.sampled_from([math.inf, math.nan, 1e30]), threads=splits)
@on_any_split
def test_a_row_depends_on_itself_alone(backend, data, worst):
    """Not on its number, nor on infinity, NaN or large numbers in other rows."""
    case = data.draw(cases(backend, dtypes_of(backend), **many_steps))
    count, row = data.draw(st.integers(1, 2)), case.seed % (case.B - 1)
    rows, operands = slice(row, row + count), sum(a is not None for a in case.values)
    operands -= len(case.cell.states) * case.zeros

    def of_rows(results):
        return [a[..., rows, :] for a in (*results[0], *results[1][:operands])]

    whole, alone = case.results(), case.results(None, *case.rows(rows))
    alone = [*alone[0], *alone[1][:operands]]
    assert same(of_rows(whole), alone)
    for a in case.values:
        if a is not None:
            a[..., (row + count) % case.B, :] = worst
    spoilt = of_rows(case.results())
    if backend in ("numba-bf16x3", "numba-bf16x6"):  # the call may run again without the unit
        assert largest_error(spoilt, [a.double() for a in alone]) < BOUNDS[backend]
    else:
        assert same(spoilt, alone)


@each_backend
@settings(max_examples=80, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_a_sequence_in_pieces_and_in_steps(backend, data):
    case = data.draw(cases(backend, dtypes_of(backend), **many_steps, **one_way))
    count = len(case.cell.states)
    x, *others = [None if a is None else a.to(case.dtype) for a in case.values]
    states, inputs = tuple(others[:count]), dict(zip(case.cell.inputs, others[count:]))
    first = None if case.zeros else states if count > 1 else states[0]
    cuts = sorted({0, case.T, *data.draw(st.lists(st.integers(0, case.T), max_size=3))})

    def run(state, steps, single=False):
        given_x = None if x is None else x[steps]
        named = {name: a[steps] for name, a in inputs.items()}
        options = {"inputs": named} if named else {}
        if single:
            return case.module.step(given_x, state, **options)
        return case.module(given_x, state, **options, **{name: a[steps] for name, a in case.masks.items()})

    with torch.no_grad():
        whole, last = run(first, slice(None))
        outputs, state = [], first
        for begin, end in itertools.pairwise(cuts):
            output, state = run(state, slice(begin, end))
            outputs.append(output)
        assert same([torch.cat(outputs), *flat(state)], [whole, *flat(last)])
        if not case.masks and x is not None:
            state = first
            for t in range(case.T):
                output, state = run(state, t, single=True)
                assert torch.equal(output, whole[t])
            assert same(flat(state), flat(last))


@each_backend
@settings(max_examples=100, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_a_step_is_a_sequence_of_one(backend, poisoned, data):
    """Its gradients, too; and so is the call of a cell."""
    options = {
        "size": st.tuples(st.just(1), SIZES, SIZES, SIZES),
        "heads": st.just(1),
        "mask": st.just(""),
        "bidirectional": st.just(False),
    }
    case = data.draw(cases(backend, dtypes_of(backend, True), **options))
    if not case.I:
        return
    callers, count = [case.module, case.module.step], len(case.cell.states)
    if case.name in CELL_MODULES:
        options = {"bias": case.bias, "dtype": case.dtype, "backend": backend}
        callers.append(CELL_MODULES[case.name](case.I, case.H, **options))
        callers[2].load_state_dict({name.removesuffix("_l0"): a for name, a in case.module.state_dict().items()})
    for _ in range(2):  # the second finds packed weights
        results = []
        for call in callers:
            x, *others = [a.to(case.dtype, copy=True).requires_grad_() for a in case.values]
            states, inputs = others[:count], dict(zip(case.cell.inputs, others[count:]))
            hx = [a[0] for a in states] if call is callers[-1] and len(callers) > 2 else states
            hx = None if case.zeros else tuple(hx) if count > 1 else hx[0]
            named = inputs if call is case.module else {name: a[0] for name, a in inputs.items()}
            result = call(x if call is case.module else x[0], hx, **({"inputs": named} if inputs else {}))
            last = [a.flatten() for a in flat(result)[-count:]]
            weights = list((case.module if call in callers[:2] else call).parameters())
            leaves = [x, *([] if case.zeros else states), *inputs.values(), *weights]
            ends = [torch.linspace(-1, 1, len(a)).to(a.dtype) for a in last]
            results.append([*last, *torch.autograd.grad(last, leaves, ends, materialize_grads=True)])
        assert all(same(other, results[0]) for other in results[1:])
