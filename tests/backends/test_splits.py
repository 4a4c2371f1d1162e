"""Every kind of layer has the bits of one thread on any number of teams and of threads in a team.

The threads wait at random, see `tests.helpers.delays`: so a missing barrier changes bits in nearly every run.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fastlstm
from fastlstm import cells
from tests.helpers.delays import build_native, delays_in_native, delays_in_numba
from tests.helpers.modules import flat
from tests.helpers.quantized import KERNELS
from tests.helpers.rnn import gadget, of_heads, of_heads_and_rows
from tests.helpers.threads import SPLITS, limits, split


@cells.cell(
    gates={"z": "xh", "n": "xh", "m": "x"}, states=("h", "c"), products=("z_h", "n_h", "m_c"), params={"p": 0.5},
)  # fmt: skip
def of_products(z, n, m, h, c, z_h, n_h, m_c, p):
    """Two products of one value, one of another, whose operand needs the first two, and a mean."""
    r = cells.tanh(n) * h
    c = cells.sigmoid(z + z_h(r)) * c + cells.tanh(n_h(r))
    return cells.tanh(cells.layer_norm(m + m_c(c)) * p) + 0.5 * h, c


def rnn(cell, **options):
    return lambda I, H, dtype, **others: fastlstm.RNN(cell, I, H, dtype=dtype, **options, **others)


def of(kind, **options):
    return lambda I, H, dtype, **others: kind(I, H, dtype=dtype, **options, **others)


KINDS = {
    "LSTM": of(fastlstm.LSTM),
    "GRU": of(fastlstm.GRU),
    "Elman": of(fastlstm.Elman),
    "regularized": of(fastlstm.LSTM, recurrent_dropout=0.3, zoneout=(0.2, 0.1)),
    "params": rnn(gadget),
    "norms": rnn(cells.layer_norm_lstm),
    "heads": rnn(of_heads, heads=3),
    "means": rnn(of_heads_and_rows, heads=3),
    "products": rnn(of_products),
}
NATIVE = [
    each
    for name in KERNELS
    for each in (pytest.param(name), pytest.param(f"{name} with delays", marks=pytest.mark.slow))
]
OF_NATIVE = "LSTM", "GRU"


def on_kernels(*kinds):
    """Run a test for each of these kinds on each backend that has them."""
    cases = [(kind, "numba") for kind in kinds]
    cases += [pytest.param(kind, *p.values, marks=p.marks) for p in NATIVE for kind in kinds if kind in OF_NATIVE]
    return pytest.mark.parametrize(("kind", "kernels"), cases, indirect=["kernels"])


splits = st.sampled_from(SPLITS[1:])  # without that of one thread
# T, B, I and H: one or several time chunks, rows of a team and vector groups of units
sizes = st.tuples(*map(st.sampled_from, ([1, 2, 9, 20], [1, 2, 20, 70], [1, 7, 40, 100], [3, 15, 48, 96, 159])))
flags = st.fixed_dictionaries(
    {name: st.sampled_from([True, True, False]) for name in ("states", "x_grad", "bias")} | {"masked": st.booleans()}
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
# many short time chunks in the backward pass, none of few pairs, or what the sizes give
chunks = st.sampled_from([{"CHUNK_PAIRS": 8, "FEW_PAIRS": 0}, {}])
seeds = st.integers(0, 1 << 30)
unshrunk = partial(settings, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # a race is another in every run


@pytest.fixture(scope="module")
def kernels(request, tmp_path_factory):
    """A backend, and what its kernels run under. Those of `native` are the installed ones, or built with delays."""
    if request.param == "numba":
        return "numba", delays_in_numba
    if request.param == "native":
        return "native", nullcontext
    return "native", partial(delays_in_native, build_native(tmp_path_factory.mktemp("native")))


def results(make, sizes, dtype, masked, states, x_grad, bias, seed):
    """Outputs, last states and all gradients, then the outputs without gradients and those of a step."""
    torch.manual_seed(seed)
    T, B, I, H = sizes
    module = make(I, H, dtype, bias=bias)
    x = torch.randn(T, B, I).to(dtype).requires_grad_(x_grad)
    hx = [torch.randn(1, B, H).to(dtype).mul(0.1).requires_grad_() for _ in module._cell.states] if states else None
    inputs = {name: torch.randn(T, B, H).to(dtype).requires_grad_() for name in module._cell.inputs}
    options = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3} if masked else {}
    options |= {"inputs": inputs} if inputs else {}
    hx = hx[0] if hx is not None and len(hx) == 1 else hx and tuple(hx)
    found = flat(module(x, hx, **options))
    leaves = [a for a in (x, *(flat(hx) if states else ()), *inputs.values(), *module.parameters()) if a.requires_grad]
    found += torch.autograd.grad(found, leaves, [torch.randn(a.shape).to(dtype) for a in found])
    with torch.no_grad():
        found += flat(module.eval()(x, hx, **options))
        step = {"inputs": {name: a[0] for name, a in inputs.items()}} if inputs else {}
        found += flat(module.step(x[0], hx, **step))
    return [a.detach() for a in found]


def assert_one_thread_s_bits(threads, call, context, **chosen):
    """The first run is the one on many threads: it does not find what one thread has left in the memory."""
    with limits(**chosen):
        with context(), split(*threads):
            got = call()
        with split(1, 1):
            want = call()
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), (k, (a - b).abs().max(), b.abs().max())


@on_kernels(*KINDS)
@unshrunk(max_examples=15)
@given(sizes, flags, dtypes, chunks, splits, seeds)
def test_layers(kind, kernels, sizes, flags, dtype, chunks, threads, seed):
    backend, context = kernels
    make = partial(KINDS[kind], backend=backend)
    call = partial(results, make, sizes, dtype, **flags, seed=seed)
    assert_one_thread_s_bits(threads, call, context, **chunks)


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU])
@pytest.mark.parametrize("kernels", NATIVE, indirect=True)
@unshrunk(max_examples=15)
@given(sizes, st.sampled_from(["int8", "int16"]), st.booleans(), st.booleans(), splits, seeds)
def test_int8(kind, kernels, sizes, activations, masked, states, threads, seed):
    backend, context = kernels

    def call():
        torch.manual_seed(seed)
        T, B, I, H = sizes
        module = fastlstm.quantize(kind(I, H), activations)
        module.backend = backend
        hx = tuple(torch.randn(1, B, H) * 1.5 for _ in module._cell.states) if states else None
        options = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3} if masked else {}
        return flat(module(torch.randn(T, B, I), hx if hx is None or len(hx) > 1 else hx[0], **options))

    assert_one_thread_s_bits(threads, call, context)


@on_kernels("LSTM", "GRU", "norms", "heads", "products")
@unshrunk(max_examples=8)
@given(sizes, splits, seeds)
def test_streams(kind, kernels, sizes, threads, seed):
    backend, context = kernels

    def call():
        torch.manual_seed(seed)
        T, B, I, H = sizes
        module = KINDS[kind](I, H, torch.float32, backend=backend)
        stream = module.stream(B)
        return [stream(torch.randn(B, I)).clone() for _ in range(T)]

    assert_one_thread_s_bits(threads, call, context)


@pytest.mark.parametrize("kind", ["LSTM", "norms", "heads", "products"])
@unshrunk(max_examples=8)
@given(sizes, st.integers(2, 6), splits, seeds)
def test_ensembles(kind, sizes, count, threads, seed):
    """Each layer of a stack runs on one thread, and so without barriers."""

    def call():
        torch.manual_seed(seed)
        T, B, I, H = sizes
        ensemble = fastlstm.Ensemble([KINDS[kind](I, H, torch.float32, backend="numba") for _ in range(count)])
        x = torch.randn(count, T, B, I, requires_grad=True)
        found = flat(ensemble(x))
        grads = torch.autograd.grad(found, [x, *ensemble.parameters()], [torch.randn_like(a) for a in found])
        return [a.detach() for a in (*found, *grads)]

    assert_one_thread_s_bits(threads, call, nullcontext, MIN_PARALLEL_STEP=0)
