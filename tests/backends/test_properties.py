"""What holds for a layer of every cell on every backend of a CPU, whatever its sizes, masks, directions and threads."""

import copy
import itertools
import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.cases import CELLS, DRAWS, SIZES, cases, jumps, largest_error
from tests.helpers.layers import UNAVAILABLE, needs_native
from tests.helpers.modules import flat, same
from tests.helpers.numba import needs_pieces, needs_unit
from tests.helpers.rnn import loop
from tests.helpers.streams import check_bits
from tests.helpers.threads import on_any_split, split, splits
from tests.helpers.tolerances import BF16, F16, F32, F64

BACKENDS = {
    "numba": (),
    "native": needs_native,
    "numba-bf16": needs_unit,
    "numba-bf16x3": needs_pieces,
    "numba-bf16x6": needs_pieces,
}
on_backends = [pytest.param(name, marks=marks) for name, marks in BACKENDS.items()]
each_backend = pytest.mark.parametrize("backend", on_backends)
and_the_reference = pytest.mark.parametrize("backend", [*on_backends, "reference"])
# Of the largest value of a tensor, or of one; gradients may err by twice as much. Of float64 and float32 a hundred
# roundings. A factor of the others keeps 8, 16 or all bits and errs by half of the last one's value, which a step may
# multiply; norms and quotients of small numbers lose up to three bits more. The steps of LSTMs and GRUs have neither,
# and no value above one: a fifth of each is enough for these.
BOUNDS = {F64: 2.3e-14, F32: 1.2e-5, "numba-bf16": 0.1, "numba-bf16x3": 4e-4, "numba-bf16x6": 2e-5}
MOVES = 20  # of results, by one rounding of all numbers that a case has: there is one for each product and step as well
NARROW_BOUND = 0.1  # of tensors of bfloat16, whose factors, states and results have 8 bits
PLAIN = ("lstm", "gru")
many_steps = {
    "size": st.tuples(
        *map(st.sampled_from, ([1, 2, 5, 9, 40, 70], [3, 8, 17, 33, 70], [1, 7, 40, 150], [1, 7, 33, 64, 100]))
    )
    # weights of more than a megabyte, of which few rows take each panel as they lie
    | st.sampled_from([(1, 40, 200, 272), (1, 40, 17, 528), (1, 40, 100, 330), (3, 9, 100, 650)])
}
one_way = {"bidirectional": st.just(False), "batch_first": st.just(False), "every": st.just(False)}


# heads that the bf16 unit takes, of few pairs and of many, whose sums of weight gradients have subtotals and two sets
of_heads = {
    "heads": st.sampled_from([2, 3]),
    "size": st.tuples(*map(st.sampled_from, ([1, 2, 3, 9, 40], [1, 3, 17, 70, 130], [1, 7, 33], [64, 64, 128]))),
}


def dtypes_of(backend, sixteen_bits=False):
    if backend == "reference":
        return (F32, F64)
    if "bf16" in backend:
        return (F32, BF16) if sixteen_bits and backend == "numba-bf16" else (F32,)
    return (F32, F64, BF16, F16) if sixteen_bits else (F32, F64)


def keeps_errors_small(case):
    """Whether roundings of 8 bits stay within the bounds: norms of some cells multiply them over dozens of steps."""
    return case.T <= 9 or case.name in PLAIN


@pytest.mark.parametrize(
    ("backend", "more"),
    [
        *[pytest.param(name, {}, marks=marks, id=name) for name, marks in BACKENDS.items()],
        *[
            pytest.param(name, of_heads, marks=marks, id=f"heads on {name}")
            for name, marks in BACKENDS.items()
            if "bf16" in name
        ],
    ],
)
@settings(max_examples=150, **DRAWS)
@given(data=st.data(), threads=splits)
def test_results_and_gradients(backend, more, data, threads, poisoned):
    """They are near those of float64, and the same bits in the first call and in the second, which follows a plan; in
    calls without gradients; and on one thread.
    """
    case = data.draw(cases(backend, dtypes_of(backend), **more))
    with split(*threads):
        outputs, gradients = case.results()
        again = case.results()
        assert same([*again[0], *again[1]], [*outputs, *gradients])
        with torch.no_grad():
            for _ in range(2):  # packs the weights, and finds them packed
                assert same(case.call(case.module)[0], outputs)
    if case.dtype is F64 or (not jumps(case.cell) and ("bf16" not in backend or keeps_errors_small(case))):
        true_outputs, true_gradients = case.results(case.exact)
        bound = case.layers * BOUNDS.get(backend, BOUNDS[case.dtype]) / (5 if case.name in PLAIN else 1)
        errors = largest_error(outputs, true_outputs), largest_error(gradients, true_gradients)
        exceeded = [k for k, limit in enumerate((bound, 2 * bound)) if not errors[k] < limit]
        if exceeded:  # norms of some cells multiply roundings over dozens of steps
            moves = [*map(largest_error, case.moved(), (true_outputs, true_gradients))]
            assert all(errors[k] < MOVES * moves[k] for k in exceeded)
    with split(1, 1):
        alone = case.results(copy.deepcopy(case.module))
    assert same([*alone[0], *alone[1]], [*outputs, *gradients])


@settings(max_examples=200, **DRAWS)
@given(data=st.data())
def test_the_reference_is_a_loop_over_what_authors_write(data):
    """In every layer and direction, under every mask, for every head by itself."""
    name = data.draw(st.sampled_from(list(CELLS)))
    has_both_means = {"mean", "mean_of_head"} <= CELLS[name].derived().forward.operations().keys()
    options = {"heads": st.just(1)} if has_both_means else {}  # a function can take one of them of values by heads
    case = data.draw(cases("reference", (F64,), name=st.just(name), **options))
    case.values = [None if a is None else a.nan_to_num() for a in case.values]  # a loop multiplies padding with zeros
    (outputs, gradients), (want, wanted) = case.results(), case.results(run=partial(loop, case.module))
    assert largest_error(outputs, want) < BOUNDS[F64]
    assert largest_error(gradients, wanted) < 2 * BOUNDS[F64]


@pytest.mark.parametrize("backend", ["numba", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("dtype", [BF16, F16])
@settings(max_examples=200, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_sixteen_bits(backend, dtype, poisoned, data):
    """They are computed in float32 and rounded once, but for products of bfloat16 where the processor has them. On one
    thread they have the same bits.
    """
    case = data.draw(cases(backend, (dtype,), layers=st.just(1)))
    got, gradients = case.results()
    assert {a.dtype for a in (*got, *gradients)} == {dtype}
    with torch.no_grad():
        assert same(case.call(case.module)[0], got)
    with split(1, 1):
        alone = case.results(copy.deepcopy(case.module))
    assert same([*alone[0], *alone[1]], [*got, *gradients])
    on_unit = backend == "numba" and dtype is BF16 and UNAVAILABLE["numba-bf16"] is None
    if on_unit and case.name not in PLAIN:
        if not jumps(case.cell) and keeps_errors_small(case):
            want, wanted = case.results(case.exact)
            assert largest_error(got, want) < NARROW_BOUND
            assert largest_error(gradients, wanted) < 2 * NARROW_BOUND
        return
    wide = copy.deepcopy(case.module).float()
    wide.backend = "numba-bf16" if on_unit else backend
    want, wanted = case.results(wide)
    assert same(got, [a.to(dtype) for a in want])
    if case.bidirectional:  # the gradients of x and of the inputs are sums of two that are rounded
        has_x, states = case.I > 0, len(case.cell.states) * (not case.zeros)
        for each in (gradients, wanted):
            del each[has_x + states : has_x + states + len(case.cell.inputs)], each[:has_x]
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
    count = data.draw(st.sampled_from([1, 1, 2, case.B - 1]))
    row = case.seed % (case.B - count)
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
    results = case.results()
    if case.dtype is F64 and math.isnan(worst):  # which travels as far as the mathematics says
        for got, want in zip(results, case.results(case.exact)):
            assert same([a.isnan() for a in got], [a.isnan() for a in want])
    spoilt = of_rows(results)
    if backend in ("numba-bf16x3", "numba-bf16x6"):  # the call may run again without the unit
        assert largest_error(spoilt, [a.double() for a in alone]) < BOUNDS[backend]
    else:
        assert same(spoilt, alone)


@each_backend
@settings(max_examples=80, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_a_sequence_in_pieces_and_in_steps(backend, data):
    case = data.draw(cases(backend, dtypes_of(backend), **many_steps, **one_way, mask=st.sampled_from(["", "reset"])))
    x, first, inputs, _ = case.operands(case.module)
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
    sizes = st.tuples(st.just(1), SIZES, SIZES, SIZES)
    case = data.draw(cases(backend, dtypes_of(backend, True), size=sizes, mask=st.just(""), **one_way))
    runs, single = [(case.module, case.call), (case.module, case.step)], case.single()
    runs += [] if single is None else [(single, case.step)]
    for _ in range(2):  # the second finds packed weights
        results = []
        for module, run in runs:
            ends, leaves = run(module)
            last = [a.flatten() for a in (ends[1 : 1 + len(case.cell.states)] if run == case.call else ends)]
            directions = [torch.linspace(-1, 1, len(a)).to(a.dtype) for a in last]
            wanted = [*leaves, *module.parameters()]
            results.append([*last, *torch.autograd.grad(last, wanted, directions, materialize_grads=True)])
        assert all(same(other, results[0]) for other in results[1:])


@and_the_reference
@settings(max_examples=100, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_some_gradients_of_some_results(backend, data):
    """They are those among all, in a new module and in one whose plans are there, and with kernels to the bit. For a
    result that has no gradient those of zeros count.
    """
    case = data.draw(cases(backend, dtypes_of(backend, True)))
    outputs, leaves = case.call(case.module)
    everything = [*leaves, *case.module.parameters()]
    flags = data.draw(st.lists(st.booleans(), min_size=len(everything), max_size=len(everything)).filter(any))
    ends = data.draw(st.lists(st.sampled_from(range(len(outputs))), min_size=1, unique=True))
    directions = case.directions(outputs)
    zeroed = [a if k in ends else torch.zeros_like(a) for k, a in enumerate(directions)]
    if not any(outputs[k].requires_grad for k in ends):
        return  # there is no step
    want = torch.autograd.grad(outputs, everything, zeroed, materialize_grads=True)
    fresh = copy.deepcopy(case.module)
    # what does not require gradients, and what does although nobody asks for its gradient
    for module, requires_all in itertools.product((case.module, fresh), (True, False)):
        required = iter([requires_all or flag for flag in flags])
        wants = [
            a is not None and not (case.zeros and 0 < k <= len(case.cell.states)) and next(required)
            for k, a in enumerate(case.values)
        ]
        for a in module.parameters():
            a.requires_grad_(next(required))
        got, leaves = case.call(module, wants=wants)
        everything = zip([*leaves, *module.parameters()], want, flags, strict=True)
        tensors = [(a, b) for a, b, is_wanted in everything if is_wanted]
        dependent = [k for k in ends if got[k].requires_grad]
        if dependent:
            found = torch.autograd.grad(
                [got[k] for k in dependent], [a for a, _ in tensors], [directions[k] for k in dependent],
                materialize_grads=True,
            )  # fmt: skip
            if backend == "reference":  # torch adds the gradients of two directions in either order
                assert largest_error(found, [b for _, b in tensors]) < 2 * BOUNDS[case.dtype]
            else:
                assert same(found, [b for _, b in tensors])


@and_the_reference
@settings(max_examples=60, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_states_that_no_step_reads_reach_nothing(backend, data):
    """Those of rows without steps, which are their last states, too."""
    case = data.draw(cases(backend, dtypes_of(backend, True), mask=st.just("lengths"), zeros=st.just(False)))
    case.lengths[:: 1 + case.seed % 3] = 0
    empty, results, count = case.lengths == 0, [], 1 + len(case.cell.states)
    for value in (0.0, math.nan):
        for a in case.values[1:count]:
            a[:, empty] = value
        outputs, gradients = case.results()
        assert all((a[:, empty].isnan() == math.isnan(value)).all() for a in outputs[1:count])
        results.append([outputs[0], *(a[:, ~empty] for a in outputs[1:count]), *gradients])
    assert same(*results)


@each_backend
@settings(max_examples=60, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_states_of_zeros(backend, data):
    """What they are multiplied with is left out, and nothing else changes. Kernels tell 0.0 from -0.0, by its bits."""
    case, results = data.draw(cases(backend, dtypes_of(backend, True), zeros=st.just(False))), []
    count = 1 + len(case.cell.states)
    for zero in (0.0, -0.0, None):
        for a in case.values[1:count]:
            a.fill_(0.0 if zero is None else zero)
        case.zeros = zero is None
        outputs, gradients = case.results()
        if not case.zeros:
            del gradients[case.I > 0 : (case.I > 0) + count - 1]
        results.append([*outputs, *gradients])
    assert all(same(other, results[0]) for other in results[1:])


@each_backend
@settings(max_examples=60, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_a_stream_has_the_bits_of_steps(backend, poisoned, data):
    """On its own states, and on those of a caller with any number of rows."""
    case = data.draw(cases(backend, dtypes_of(backend, True), mask=st.just(""), **one_way))
    if case.B:
        check_bits(case.single() if case.seed % 3 == 0 and case.single() else case.module, case.B)


LAYOUTS = [
    torch.clone,
    lambda a: a.mT.contiguous().mT if a.dim() > 1 else a,
    lambda a: a.transpose(0, 1).contiguous().transpose(0, 1) if a.dim() > 1 else a,
    lambda a: a.repeat_interleave(2, -1)[..., ::2],
    lambda a: torch.cat([a, torch.full_like(a, math.nan)], -1)[..., : a.shape[-1]],
    lambda a: torch._neg_view(-a),
]


@each_backend
@settings(max_examples=60, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_tensors_that_lie_in_another_way(backend, data):
    """Operands, weights and gradients of outputs have any strides, which alternate from call to call of one module."""
    case = data.draw(cases(backend, dtypes_of(backend, True)))
    outputs, gradients = case.results()
    generator, weights = random.Random(case.seed), {name: a.detach() for name, a in case.module.named_parameters()}
    # a call of negated tensors follows no plan, and then products of bfloat16 read h in float32
    layouts = LAYOUTS[:-1] if case.dtype is BF16 else LAYOUTS
    case.place = lambda a: generator.choice(layouts)(a)
    for _ in range(3):
        for name, a in weights.items():
            setattr(case.module, name, torch.nn.Parameter(generator.choice(layouts)(a)))
        got, found = case.results()
        assert same([*got, *found], [*outputs, *gradients])
