"""How threads share a call: every one has work, and no split is predicted to take longer than fewer threads."""

import ctypes
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlstm
from fastlstm import cells
from fastlstm.backends import csrc
from fastlstm.backends.numba.host import sizes
from fastlstm.backends.numba.host.thread_split import predicted_time, split_threads
from fastlstm.backends.numba.kernels.threads import share, share_rows
from tests.helpers.layers import needs_native
from tests.helpers.numba import signature

CELLS = cells.lstm, cells.gru, cells.ind_rnn, cells.peephole_lstm, cells.layer_norm_lstm, cells.gru_reset_before
sizes_of_axes = st.integers(0, 9).map(lambda k: 2**k)  # 1 to 512


@st.composite
def signatures(draw):
    T, B, I, H = (max(1, draw(sizes_of_axes) + draw(st.integers(-3, 3))) for _ in range(4))
    dtype, components = draw(st.sampled_from([(torch.float32, 0), (torch.float32, 3), (torch.float64, 0)]))
    stack_size = draw(st.sampled_from([None, None, 2, 7]))
    of_cell = {"cell": draw(st.sampled_from(CELLS)), "components": components, "stack_size": stack_size}
    return signature(T, B, I, H, dtype)._replace(**of_cell)


@settings(max_examples=400)
@given(signatures(), st.integers(1, 70), st.booleans())
def test_no_team_and_no_member_is_without_work(s, available, backward):
    panels = sizes.panels_of(s.H, sizes.lanes_of(s.dtype))
    threads, teams = split_threads(available, s, panels, backward)
    assert 1 <= threads <= available
    if s.stack_size:
        assert teams == 1
        assert threads <= s.stack_size
        return
    assert threads % teams == 0
    members, unit = threads // teams, max(2, sizes.row_group(s))
    rows = [share_rows(s.B, unit, k, teams) for k in range(teams + 1)]
    assert all(first < last for first, last in pairwise(rows))
    parts = sizes.panels_of(panels, 4) if backward else panels
    owned = [share(parts, k, members) for k in range(members + 1)]
    assert all(first < last for first, last in pairwise(owned))
    time = predicted_time(s, panels, backward)
    assert time(teams, members) <= time(1, 1)


@pytest.mark.parametrize(
    ("available", "sizes_of_layer", "threads", "teams"),
    [
        (8, (1, 1, 28, 128), 1, 1),  # a step that is over before the threads have woken
        (64, (28, 1, 28, 64), 1, 1),  # and one that is shorter than its barrier
        (64, (28, 1, 28, 128), 4, 1),  # more members would only make the barrier longer
        (16, (28, 128, 28, 128), 16, 8),  # 14 teams of enough rows would leave two threads without work
        (16, (28, 128, 256, 512), 16, 2),  # two teams of a row block each, since all of them read 6 MB of weights
        (2, (28, 128, 28, 128), 2, 2),  # rows, to each thread those that fill a pass
        (2, (28, 64, 128, 512), 2, 1),  # many weights: units
        (2, (512, 16, 64, 64), 2, 2),  # few weights: rows, however few
        (2, (28, 1, 28, 128), 2, 1),  # one row has only units to split
        (8, (100, 1, 2000, 16), 1, 1),  # no more threads than have something to do
    ],
)
def test_splits(available, sizes_of_layer, threads, teams):
    s = signature(*sizes_of_layer)
    assert split_threads(available, s, sizes.panels_of(s.H, 16)) == (threads, teams)


def test_a_pass_back_reads_fewer_weights():
    """It splits rows where the pass forward, which reads weight_ih too, splits units."""
    s = signature(28, 16, 28, 128)
    assert [split_threads(2, s, 8, backward) for backward in (False, True)] == [(2, 1), (2, 2)]


@pytest.mark.parametrize("cell", [cells.gru, cells.gru_reset_before])
def test_a_product_of_a_value_changes_no_split(cell):
    """It takes one barrier more, which costs less than that each of two teams reads all weights."""
    s = signature(100, 16, 64, 256)._replace(cell=cell)
    assert [split_threads(2, s, 16, backward) for backward in (False, True)] == [(2, 1), (2, 1)]


def test_row_groups_are_not_split():
    """80 rows whose gradients of params are summed in groups of 8: with 8 teams two would have 16 rows."""
    s = signature(100, 80, 64, 64)._replace(cell=cells.peephole_lstm)
    assert [split_threads(n, s, 4) for n in (5, 8, 10)] == [(5, 5), (8, 2), (10, 10)]


TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, TASK, ctypes.c_void_p, ctypes.c_int)


@needs_native
@settings(max_examples=100)
@given(
    st.integers(0, 5).map(lambda k: 2**k), st.sampled_from([1, 24, 48]), st.integers(1, 130), st.integers(1, 130),
    st.sampled_from(["LSTM", "GRU"]), st.integers(1, 4),
)  # fmt: skip
def test_native_splits_alike(T, B, I, H, kind, available):
    """Teams get as many rows of these by pairs, which `numba` does not split, as by rows, which `native` splits."""
    found = []

    def parallel(context, task, job, threads):
        found.append((threads, ctypes.c_int64.from_address(job).value))  # the first field of a job is its teams
        task(job, 0, 1)

    callback = PARALLEL(parallel)
    argument = csrc.THREADS.pack(available, ctypes.cast(callback, ctypes.c_void_p).value, 0)
    layer = getattr(fastlstm, kind)(I, H, backend="native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csrc, "threads_argument", lambda _: argument)
        layer(torch.zeros(T, B, I))[0].sum().backward()
    s = signature(T, B, I, H)._replace(cell=cells.lstm if kind == "LSTM" else cells.gru)
    lanes = csrc.library.fastlstm_lanes(0, csrc.instructions)
    expected = [split_threads(available, s, -(-H // lanes), backward, True) for backward in (False, True)]
    assert found == [split for split in expected if split != (1, 1)]
