"""What a call of `fastlstm.RNN` takes: packed sequences, resets, single steps, inputs of size 1, a state alone."""

import re

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_padded_sequence

from fastlstm import cells
from tests.helpers.modules import assert_same_gradients, randn
from tests.helpers.rnn import RNN, gadget, given, no_product
from tests.helpers.tolerances import close


@pytest.mark.parametrize("cell", [cells.mgu, no_product], ids=lambda cell: cell.name)
def test_a_tensor_is_the_state_of_a_cell_with_one(cell):
    rnn = RNN(cell, 3, 5, 2)
    x, states, _ = given(rnn)
    for module in (rnn, torch.compile(rnn, fullgraph=True, backend="aot_eager")):
        got, want = module(x, states[0]), module(x, states)
        assert type(got[1]) is tuple
        close(got, want, "sums")
    close(rnn(x[:, 0], states[0][:, 0]), rnn(x[:, 0], (states[0][:, 0],)), "sums")
    got = rnn.step(x[0], states[0])
    assert type(got[1]) is tuple
    close(got, rnn.step(x[0], states), "sums")


SHAPES = st.sampled_from([(T, B, H) for T in (1, 6) for B in (1, 4) for H in (1, 5)])
OPTIONS = st.fixed_dictionaries({"bidirectional": st.booleans(), "batch_first": st.booleans()})


@settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(SHAPES, SHAPES, OPTIONS, st.booleans())
def test_inputs_of_size_1(m, d, options, masked):
    """They are the expanded ones, and their gradients have their own shapes."""
    rnn = RNN(gadget, 3, 5, 2, **options)
    turned = (lambda a: a.transpose(0, 1)) if rnn.batch_first else (lambda a: a)
    x, states, _ = given(rnn)
    inputs = {"m": randn(*m), "d": randn(*d)}
    results = []
    for of in (lambda a: a, lambda a: a.expand(6, 4, 5)):
        taken = {name: turned(of(a)) for name, a in inputs.items()}
        output, last = rnn(turned(x), states, taken, lengths=[2, 6, 1, 4] if masked else None)
        results.append([output, *last])
    assert_same_gradients(rnn, rnn, *results, [x, *states, *inputs.values()])


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (1, 1)])
def test_inputs_of_size_1_in_steps(shape):
    rnn = RNN(gadget, 3, 5)
    x, states, inputs = given(rnn)
    small = randn(*shape)
    got, want = (rnn.step(x[0], states, {"m": inputs["m"][0], "d": d}) for d in (small, small.expand(4, 5)))
    close(got, want, "sums")
    alone, _ = rnn.step(x[0, 0], tuple(a[:, 0] for a in states), {"m": inputs["m"][0, 0], "d": small[0]})
    close(alone, got[0][0], "sums")
    message = re.escape("inputs['d'] must have shape (B, H) = (4, 5), where any size may be 1, got (5,)")
    with pytest.raises(ValueError, match=message):
        rnn.step(x[0], states, {"m": inputs["m"][0], "d": torch.zeros(5)})
    with pytest.raises(ValueError, match=re.escape("inputs['d'] must have shape (H,) = (5,)")):
        rnn.step(x[0, 0], None, {"m": inputs["m"][0, 0], "d": torch.zeros(4)})


def test_packed_sequences_take_inputs_of_size_1():
    rnn, n = RNN(gadget, 3, 5), torch.tensor([2, 6, 1, 4])
    x, states, inputs = given(rnn)
    packed, small = pack_padded_sequence(x, n, enforce_sorted=False), {"m": randn(6, 1, 1), "d": inputs["d"]}
    want = rnn(packed, states, {name: a.expand(6, 4, 5) for name, a in small.items()})
    got = rnn(packed, states, small)
    close((got[0].data, got[1]), (want[0].data, want[1]), "sums")


def test_a_mask_of_booleans_is_an_input():
    rnn = RNN(gadget, 3, 5)
    x, states, inputs = given(rnn)
    mask, found = torch.rand(6, 4, 1) < 0.5, []
    for m in (mask, mask.to(x.dtype)):
        of_step = {"m": m[0], "d": inputs["d"][0].detach()}
        stream = rnn.stream(4)(x[0].detach(), of_step)
        found.append((rnn(x, states, {**inputs, "m": m}), rnn.step(x[0], None, of_step), stream))
    close(*found, "values")
