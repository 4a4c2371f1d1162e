"""Layers of every cell with their products of bfloat16: gates that take x, h or both, norms, products, heads."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastlstm
from fastlstm import cells
from tests.helpers.modules import flat
from tests.helpers.numba import PRECISIONS, needs_pieces, needs_unit
from tests.helpers.rnn import gadget, no_product, of_heads, of_heads_and_rows, of_products, without_x
from tests.helpers.threads import on_any_split, split, splits

OWN = (gadget, no_product, of_heads, of_heads_and_rows, of_products, without_x)
CELLS = {cell.name: cell for cell in (*cells.CELLS, cells.rhn(3), *OWN)}
UNGATED = ("lif", "synaptic", "alif")  # which multiply nothing
MULTIPLIED = [name for name in CELLS if name not in UNGATED]
BACKENDS = (
    pytest.param("numba-bf16", marks=needs_unit),
    *(pytest.param(name, marks=needs_pieces) for name in PRECISIONS[1:]),
)
# Of the largest value of a tensor, or of one. A factor keeps 8, 16 or all bits and errs by half of the last one's
# value, which a step or two may multiply; norms and quotients of small numbers lose up to three bits more.
BOUNDS = {"numba-bf16": 0.1, "numba-bf16x3": 4e-4, "numba-bf16x6": 2e-5}
SIZES = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 65, 100])
FEW = {"deadline": None, "suppress_health_check": list(HealthCheck)}  # the first call compiles


def draw(cell, T, B, I, H, *, heads=1, seed=0, dtype=torch.float32, **masks):
    """A module of a cell, one in float64 of the same weights, and what both are called with."""
    torch.manual_seed(seed)
    heads = heads if cell.products or any("h" in gate for gate in cell.gates.values()) else 1
    H = 15 if H < 3 and cell.derived().means else H  # a norm of one or two units divides by rounding errors
    H, I = H * heads, I if cell.gates_of_x else 0
    module, exact = (
        fastlstm.RNN(cell, I, H, heads=heads, dtype=each, backend=backend)
        for each, backend in ((dtype, None), (torch.float64, "reference"))
    )
    with torch.no_grad():
        for a in module.parameters():
            a.copy_(a.to(torch.bfloat16))  # so that every precision has the same weights
    exact.load_state_dict({name: a.double() for name, a in module.state_dict().items()})
    x = torch.randn(T, B, I) if I else None
    # a state n is a sum of positive numbers, and a divisor
    states = [torch.rand(1, B, H) + 1 if name == "n" else torch.randn(1, B, H) * 0.3 for name in cell.states]
    inputs = [torch.randn(T, B, H) for _ in cell.inputs]
    options = {"lengths": torch.randint(0, T + 1, (B,))} if masks.get("ended") else {}
    options |= {"reset": torch.rand(T, B) < 0.3} if masks.get("reset") else {}
    return module, exact, [None if a is None else a.bfloat16().float() for a in (x, *states, *inputs)], options


def results(module, values, options):
    """Outputs, last states, and the gradients of everything, by the same directions for every type."""
    cell, dtype = module.cell, next(module.parameters()).dtype
    x, *others = [None if a is None else a.to(dtype, copy=True).requires_grad_() for a in values]
    states, inputs = others[: len(cell.states)], others[len(cell.states) :]
    named = {"inputs": dict(zip(cell.inputs, inputs))} if inputs else {}
    found = flat(module(x, tuple(states) if len(states) > 1 else states[0], **options, **named))
    directions = [torch.linspace(-1, 1, a.numel()).view_as(a).to(dtype) for a in found]
    leaves = [a for a in (x, *states, *inputs) if a is not None]
    gradients = torch.autograd.grad(found, [*leaves, *module.parameters()], directions, allow_unused=True)
    return found, [a for a in gradients if a is not None]


def largest_error(got, want):
    """Of all tensors, relative to the largest value of each, or to one."""
    pairs = [(a.detach().double(), b.detach()) for a, b in zip(got, want, strict=True)]
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).nan_to_num(nan=math.inf) for a, b in pairs if b.numel()
    )


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, **FEW)
@given(
    name=st.sampled_from(MULTIPLIED), T=st.sampled_from([1, 2, 5]), B=SIZES, I=SIZES, H=SIZES,
    heads=st.sampled_from([1, 1, 2, 3]), seed=st.integers(0, 99), ended=st.booleans(), reset=st.booleans(),
    threads=splits,
)  # fmt: skip
@on_any_split
def test_against_float64(backend, name, T, B, I, H, heads, seed, ended, reset):
    module, exact, values, options = draw(CELLS[name], T, B, I, H, heads=heads, seed=seed, ended=ended, reset=reset)
    module.backend = backend
    (outputs, gradients), (true_outputs, true_gradients) = (results(m, values, options) for m in (module, exact))
    assert largest_error(outputs, true_outputs) < BOUNDS[backend]
    if "relu" not in name and name != "li_gru":  # whose derivative jumps: one unit on the other side changes all
        assert largest_error(gradients, true_gradients) < BOUNDS[backend] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, **FEW)
@given(
    name=st.sampled_from(MULTIPLIED), T=st.integers(1, 5), B=st.sampled_from([1, 2, 17, 33, 70]), I=SIZES, H=SIZES,
    heads=st.sampled_from([1, 1, 2]), seed=st.integers(0, 99), masked=st.booleans(), bfloat16=st.booleans(),
    threads=splits,
)  # fmt: skip
def test_no_bit_depends_on_threads(backend, name, T, B, I, H, heads, seed, masked, bfloat16, threads):
    module, _, values, options = draw(
        CELLS[name], T, B, I, H, heads=heads, seed=seed, ended=masked, reset=masked,
        dtype=torch.bfloat16 if bfloat16 else torch.float32,
    )  # fmt: skip
    module.backend = backend
    by_split = []
    for each in ((1, 1), threads):
        with split(*each):
            outputs, gradients = results(module, values, options)
        by_split.append([*outputs, *gradients])
    for k, (alone, together) in enumerate(zip(*by_split, strict=True)):
        assert torch.equal(alone, together), k


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, **FEW)
@given(
    name=st.sampled_from(MULTIPLIED), T=st.integers(1, 4), B=st.sampled_from([2, 17, 33, 70]), I=SIZES, H=SIZES,
    heads=st.sampled_from([1, 1, 2]), seed=st.integers(0, 99), worst=st.sampled_from([math.inf, math.nan, 1e30]),
    threads=splits,
)  # fmt: skip
@on_any_split
def test_a_row_depends_on_itself_alone(backend, name, T, B, I, H, heads, seed, worst):
    """Not on its number, and not on infinity, NaN or large numbers in other rows."""
    module, _, values, _ = draw(CELLS[name], T, B, I, H, heads=heads, seed=seed)
    module.backend = backend
    row = seed % B
    alone, _ = results(module, [a if a is None else a[..., row : row + 1, :] for a in values], {})
    whole, _ = results(module, values, {})
    for got, want in zip(whole, alone, strict=True):
        assert torch.equal(got[..., row : row + 1, :], want)
    for a in values:
        if a is not None:
            a[..., (row + 1) % B, :] = worst
    spoilt, _ = results(module, values, {})
    for got, want in zip(spoilt, alone, strict=True):
        if backend == "numba-bf16":
            assert torch.equal(got[..., row : row + 1, :], want)
        else:  # the call may run again without the unit
            assert largest_error([got[..., row : row + 1, :]], [want.double()]) < BOUNDS[backend]


@needs_unit
@settings(max_examples=40, **FEW)
@given(
    name=st.sampled_from(list(CELLS)), T=st.sampled_from([1, 2, 5]), B=SIZES, I=SIZES, H=SIZES,
    heads=st.sampled_from([1, 1, 2]), seed=st.integers(0, 99), masked=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), threads=splits,
)  # fmt: skip
@on_any_split
def test_tensors_of_16_bits(name, T, B, I, H, heads, seed, masked, dtype):
    module, exact, values, options = draw(
        CELLS[name], T, B, I, H, heads=heads, seed=seed, ended=masked, reset=masked, dtype=dtype
    )
    (outputs, gradients), (true_outputs, true_gradients) = (results(m, values, options) for m in (module, exact))
    assert {a.dtype for a in (*outputs, *gradients)} == {dtype}
    if name in UNGATED:  # whose spikes jump
        return
    bound = BOUNDS["numba-bf16"] if dtype == torch.bfloat16 else 1e-2
    assert largest_error(outputs, true_outputs) < bound
    if "relu" not in name and name != "li_gru":
        assert largest_error(gradients, true_gradients) < 2 * bound


@needs_unit
@settings(max_examples=15, **FEW)
@given(
    name=st.sampled_from(MULTIPLIED), B=st.sampled_from([1, 2, 17, 33]), I=SIZES, H=SIZES, seed=st.integers(0, 99),
    threads=splits,
)  # fmt: skip
@on_any_split
def test_single_steps_are_a_sequence(name, B, I, H, seed):
    """With the gradients of both."""
    cell = CELLS[name]
    if not cell.gates_of_x:
        return
    module, _, values, _ = draw(cell, 1, B, I, H, seed=seed, dtype=torch.bfloat16)
    x, *others = [a.bfloat16().requires_grad_() for a in values]
    states, inputs = others[: len(cell.states)], dict(zip(cell.inputs, others[len(cell.states) :]))
    named = {"inputs": inputs} if inputs else {}
    step = {"inputs": {key: a[0] for key, a in inputs.items()}} if inputs else {}
    hx = tuple(states) if len(states) > 1 else states[0]
    whole = flat(module(x, hx, **named))
    stepped = flat(module.step(x[0], hx, **step))
    for a, b in zip(whole[1:], stepped[1:], strict=True):
        assert torch.equal(a, b)
    leaves = [x, *others, *module.parameters()]
    ends = [[*each[1:]] for each in (whole, stepped)]
    wanted, got = (torch.autograd.grad(end, leaves, [torch.ones_like(a) for a in end]) for end in ends)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@needs_unit
@pytest.mark.parametrize("name", ["gru", "layer_norm_gru", "slstm", "peephole_lstm"])
def test_autocast(name):
    """float32 weights under autocast give what a module of bfloat16 does."""
    module, _, (x, *_), _ = draw(CELLS[name], 6, 5, 12, 20)
    narrow = fastlstm.RNN(CELLS[name], 12, 20, dtype=torch.bfloat16)
    narrow.load_state_dict(module.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)[0]
    want = narrow(x.bfloat16())[0]
    assert torch.equal(got, want)
    gradients, expected = (
        torch.autograd.grad(a.float().sum(), list(m.parameters())) for a, m in ((got, module), (want, narrow))
    )
    for a, b in zip(gradients, expected, strict=True):
        assert torch.equal(a, b.float())
