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
from tests.helpers.delays import build_native, delays_in_native, delays_in_numba
from tests.helpers.kinds import KINDS, OF_NATIVE, results, results_of_ensemble, results_of_int8, results_of_stream
from tests.helpers.quantized import KERNELS
from tests.helpers.threads import SPLITS, limits, split

NATIVE = [
    each
    for name in KERNELS
    for each in (pytest.param(name), pytest.param(f"{name} with delays", marks=pytest.mark.slow))
]


def on_kernels(*kinds):
    """Run a test for each of these kinds on each backend that has them."""
    cases = [(kind, "numba") for kind in kinds]
    cases += [pytest.param(kind, *p.values, marks=p.marks) for p in NATIVE for kind in kinds if kind in OF_NATIVE]
    return pytest.mark.parametrize(("kind", "kernels"), cases, indirect=["kernels"])


# mostly teams of several threads, which wait for each other
splits = st.sampled_from([each for each in SPLITS if each[1] > 1]) | st.sampled_from(SPLITS[1:])
# T, B, I and H: one or several time chunks, rows of a team and vector groups of units. One in five has so many steps
# and rows that backward passes sum the gradients of weights in two sets.
sizes = st.tuples(*map(st.sampled_from, ([1, 9, 20, 20], [1, 5, 20, 70, 70], [1, 7, 40, 100], [3, 15, 48, 96, 159])))
mostly = st.sampled_from([True, True, True, False])
flags = st.fixed_dictionaries({"masked": st.booleans(), "states": mostly, "x_grad": mostly, "bias": mostly})
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
# many short time chunks in the backward pass, none of few pairs, or what the sizes give
short = {"CHUNK_PAIRS": 8, "FEW_PAIRS": 0}
chunks = st.sampled_from([short, short, {}])
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
@unshrunk(max_examples=25)
@given(sizes, flags, dtypes, chunks, splits, seeds)
def test_layers(kind, kernels, sizes, flags, dtype, chunks, threads, seed):
    backend, context = kernels
    make = partial(KINDS[kind], backend=backend)
    call = partial(results, make, sizes, dtype, **flags, seed=seed)
    assert_one_thread_s_bits(threads, call, context, **chunks)


@pytest.mark.parametrize("kind", OF_NATIVE)
@pytest.mark.parametrize("kernels", NATIVE, indirect=True)
@unshrunk(max_examples=15)
@given(sizes, st.sampled_from(["int8", "int16"]), mostly, mostly, splits, seeds)
def test_int8(kind, kernels, sizes, activations, masked, states, threads, seed):
    backend, context = kernels
    make = partial(KINDS[kind], backend=backend)
    assert_one_thread_s_bits(threads, partial(results_of_int8, make, sizes, activations, masked, states, seed), context)


@on_kernels("LSTM", "GRU", "norms", "heads", "products")
@unshrunk(max_examples=8)
@given(sizes, splits, seeds)
def test_streams(kind, kernels, sizes, threads, seed):
    backend, context = kernels
    make = partial(KINDS[kind], backend=backend)
    assert_one_thread_s_bits(threads, partial(results_of_stream, make, sizes, seed), context)


@pytest.mark.parametrize("kind", ["LSTM", "norms", "heads", "products"])
@unshrunk(max_examples=8)
@given(sizes, st.integers(2, 6), splits, seeds)
def test_ensembles(kind, sizes, count, threads, seed):
    """Each layer of a stack runs on one thread, and so without barriers."""
    call = partial(results_of_ensemble, partial(KINDS[kind], backend="numba"), sizes, count, seed)
    assert_one_thread_s_bits(threads, call, nullcontext)


def test_a_stream_begins_at_zero_whoever_comes_first():
    """From a state of zeros nothing is multiplied. No team may write its rows' new state, which lies in the same place,
    before all others have looked at the old one: they would multiply zeros with weights that may be infinite.
    """
    lstm = fastlstm.LSTM(3, 200, backend="numba")
    with torch.no_grad():
        lstm.weight_hh_l0[0] = torch.inf
    for _ in range(10):
        with delays_in_numba(), split(5, 1):
            assert lstm.stream(10)(torch.randn(10, 3)).isfinite().all()
