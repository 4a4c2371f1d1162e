"""Every kind of layer has the bits of one thread on any number of teams and of threads in a team."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlstm
from fastlstm import cells
from tests.helpers.modules import flat
from tests.helpers.quantized import KERNELS
from tests.helpers.rnn import gadget, of_heads, of_heads_and_rows
from tests.helpers.threads import split, splits


@cells.cell(
    gates={"z": "xh", "n": "xh", "m": "x"}, states=("h", "c"), products=("z_h", "n_h", "m_c"), inputs=("u",),
    params={"p": 0.5},
)  # fmt: skip
def of_products(z, n, m, h, c, z_h, n_h, m_c, u, p):
    """Two products of one value, one of another, whose operand needs the first two, and a mean."""
    r = cells.tanh(n) * h
    c = cells.sigmoid(z + z_h(r)) * c + cells.tanh(n_h(r)) * u
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
OF_NATIVE = [pytest.param(kind, backend, id=f"{kind}-{backend}") for kind in ("LSTM", "GRU") for backend in KERNELS]
sizes = st.tuples(  # T, B, I and H, whose units fill one to several vector groups
    st.integers(1, 20), st.sampled_from([1, 2, 3, 7, 20, 70]), st.sampled_from([1, 7, 40, 100]),
    st.sampled_from([3, 15, 48, 96, 159]),
)  # fmt: skip
flags = st.fixed_dictionaries({name: st.booleans() for name in ("masked", "states", "x_grad", "bias")})
seeds = st.integers(0, 1 << 30)


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


def assert_one_thread_s_bits(threads, call):
    """The first run is the one on many threads: it does not find what one thread has left in the memory."""
    with split(*threads):
        got = call()
    with split(1, 1):
        want = call()
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), (k, (a - b).abs().max(), b.abs().max())


@pytest.mark.parametrize(
    ("kind", "backend"), [*(pytest.param(kind, "numba", id=f"{kind}-numba") for kind in KINDS), *OF_NATIVE]
)
@settings(max_examples=12)
@given(sizes, flags, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), splits, seeds)
def test_layers(kind, backend, sizes, flags, dtype, threads, seed):
    assert_one_thread_s_bits(
        threads,
        lambda: results(lambda *s, **o: KINDS[kind](*s, backend=backend, **o), sizes, dtype, **flags, seed=seed),
    )


@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU])
@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=20)
@given(sizes, st.sampled_from(["int8", "int16"]), st.booleans(), st.booleans(), splits, seeds)
def test_int8(kind, backend, sizes, activations, masked, states, threads, seed):
    def call():
        torch.manual_seed(seed)
        T, B, I, H = sizes
        module = fastlstm.quantize(kind(I, H), activations)
        module.backend = backend
        hx = tuple(torch.randn(1, B, H) * 1.5 for _ in module._cell.states) if states else None
        options = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3} if masked else {}
        x = torch.randn(T, B, I)
        return flat(module(x, hx if hx is None or len(hx) > 1 else hx[0], **options))

    assert_one_thread_s_bits(threads, call)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "norms", "heads", "products"])
@settings(max_examples=8)
@given(sizes, st.sampled_from(["numba", *KERNELS]), splits, seeds)
def test_streams(kind, sizes, backend, threads, seed):
    def call():
        torch.manual_seed(seed)
        T, B, I, H = sizes
        module = KINDS[kind](I, H, torch.float32, backend=backend if kind in ("LSTM", "GRU") else "numba")
        inputs = {"inputs": {name: torch.randn(B, H) for name in module._cell.inputs}} if module._cell.inputs else {}
        stream = module.stream(B)
        return [stream(torch.randn(B, I), **inputs).clone() for _ in range(T)]

    assert_one_thread_s_bits(threads, call)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "norms", "heads"])
@settings(max_examples=8)
@given(sizes, st.integers(2, 6), splits, seeds)
def test_ensembles(kind, sizes, count, threads, seed):
    def call():
        torch.manual_seed(seed)
        T, B, I, H = sizes
        models = [KINDS[kind](I, H, torch.float32, backend="numba") for _ in range(count)]
        ensemble, x = fastlstm.Ensemble(models), torch.randn(count, T, B, I, requires_grad=True)
        found = flat(ensemble(x))
        grads = torch.autograd.grad(found, [x, *ensemble.parameters()], [torch.randn_like(a) for a in found])
        return [a.detach() for a in (*found, *grads)]

    assert_one_thread_s_bits(threads, call)
