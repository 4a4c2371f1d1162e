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
from tests.helpers.cases import cases
from tests.helpers.delays import build_native, delays_in_native, delays_in_numba
from tests.helpers.kinds import NAMES, OF_NATIVE, results, results_of_ensemble, results_of_int8, results_of_stream
from tests.helpers.quantized import KERNELS
from tests.helpers.threads import SPLITS, limits, split
from tests.helpers.tolerances import BF16, F32, F64

NATIVE = [
    each
    for name in KERNELS
    for each in (pytest.param(name), pytest.param(f"{name} with delays", marks=pytest.mark.slow))
]


def on_kernels(*names):
    """Run a test for each of these cells on each backend that has them."""
    pairs = [(name, "numba") for name in names]
    pairs += [pytest.param(name, *p.values, marks=p.marks) for p in NATIVE for name in names if name in OF_NATIVE]
    return pytest.mark.parametrize(("name", "kernels"), pairs, indirect=["kernels"])


# mostly teams of several threads, which wait for each other
splits = st.sampled_from([each for each in SPLITS if each[1] > 1]) | st.sampled_from(SPLITS[1:])
# T, B, I and H: one or several time chunks, rows of a team and vector groups of units. One in five has so many steps
# and rows that backward passes sum the gradients of weights in two sets.
units = [3, 15, 48, 64, 96, 159]
sizes = st.tuples(*map(st.sampled_from, ([1, 9, 20, 20], [1, 5, 20, 70, 70], [1, 7, 40, 100], units)))
# many short time chunks in the backward pass, none of few pairs, or what the sizes give
short = {"CHUNK_PAIRS": 8, "FEW_PAIRS": 0}
chunks = st.sampled_from([short, short, {}])
one_layer = {
    "layers": st.just(1),
    "bidirectional": st.just(False),
    "every": st.just(False),
    "batch_first": st.just(False),
}


def drawn(backend, name, dtypes=(F32,), **others):
    return cases(backend, dtypes, name=st.just(name), size=sizes, heads=st.sampled_from([1, 3]), **(one_layer | others))


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


@on_kernels(*NAMES)
@unshrunk(max_examples=25)
@given(st.data(), chunks, splits)
def test_layers(name, kernels, data, chunks, threads):
    backend, context = kernels
    case = data.draw(drawn(backend, name, (F32, F64, BF16)))
    assert_one_thread_s_bits(threads, partial(results, case), context, **chunks)


@pytest.mark.parametrize("name", OF_NATIVE)
@pytest.mark.parametrize("kernels", NATIVE, indirect=True)
@unshrunk(max_examples=15)
@given(st.data(), st.sampled_from(["int8", "int16"]), splits)
def test_int8(name, kernels, data, activations, threads):
    backend, context = kernels
    case = data.draw(drawn(backend, name))
    assert_one_thread_s_bits(threads, partial(results_of_int8, case, activations), context)


@on_kernels(*OF_NATIVE, "layer_norm_lstm", "of_heads", "gru_reset_before")
@unshrunk(max_examples=8)
@given(st.data(), splits)
def test_streams(name, kernels, data, threads):
    backend, context = kernels
    case = data.draw(drawn(backend, name))
    assert_one_thread_s_bits(threads, partial(results_of_stream, case), context)


@pytest.mark.parametrize("name", ["lstm", "layer_norm_lstm", "of_heads", "gru_reset_before"])
@unshrunk(max_examples=8)
@given(st.data(), st.integers(2, 6), splits)
def test_ensembles(name, data, count, threads):
    """Each layer of a stack runs on one thread, and so without barriers."""
    case = data.draw(drawn("numba", name))
    assert_one_thread_s_bits(threads, partial(results_of_ensemble, case, count), nullcontext)


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
