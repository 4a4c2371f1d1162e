"""How much of a layer is done at a time changes with its sizes; its results must not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlstm import lstm
from fastlstm.backends.numba.host import sizes
from tests.helpers.layers import Layer, compare, draws, error
from tests.helpers.numba import signature, under
from tests.helpers.threads import split, splits


def outputs(layer, dtype):
    x, h_0, c_0, *weights = layer.to(dtype, requires_grad=False)
    masks = {"lengths": layer.lengths, "reset": layer.reset, "reverse": layer.reverse}
    h, states = lstm(x, (h_0, c_0), *weights, backend="numba", **masks)
    return torch.cat([h.flatten(), *(a.flatten() for a in states)])


@settings(max_examples=60, deadline=None)  # the first call compiles
@given(
    T=st.integers(1, 40), B=st.sampled_from([1, 2, 3, 8, 20, 63, 64, 65]), I=st.sampled_from([1, 7, 40, 150]),
    H=st.sampled_from([1, 7, 33, 100]), reverse=st.booleans(), masked=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]), threads=splits,
)  # fmt: skip
def test_steps_that_multiply_the_input_together(T, B, I, H, reverse, masked, dtype, threads):
    """However many rows of however many steps do, no bit of the result is another."""
    layer = Layer(T, B, I, H, reverse=reverse, masked=masked)
    alone = under(lambda: outputs(layer, dtype), READ_IN_EIGHT_STEPS=1 << 60, INPUT_BLOCK_PAIRS=0)
    for rows in (70, 512):
        with split(*threads):
            together = under(lambda: outputs(layer, dtype), READ_IN_EIGHT_STEPS=0, INPUT_BLOCK_PAIRS=rows)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("size", [(40, 3, 5, 20), (9, 40, 30, 33), (3, 131, 31, 33), (70, 2, 65, 100)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_sums_over_more_pairs_at_a_time(size, masked, reverse):
    """As where they no longer stay in the caches; four chunks of them and more."""
    layers = draws(*size, reverse=reverse, masked=masked)
    results = []
    for teams in (1, 2):
        with split(teams, 1):
            calls = under(lambda: list(compare(layers, torch.float32, "numba")), SUM_BYTES=0, CHUNK_PAIRS=4)
        results.append(calls)
    for (name, got, want), (_, other, _) in zip(*results, strict=True):
        assert torch.equal(got, other), name
        assert error(got, want) < 6e-6, name  # as in test_layer: float32's rounding in sums of a few hundred terms


@pytest.mark.parametrize(
    ("size", "together"),
    [
        ((35, 8, 650, 650), True),
        ((8, 64, 650, 650), True),
        ((5, 8, 650, 650), False),  # too few steps for 13.5 MB of weights
        ((2, 32, 900, 900), False),
        ((3, 16, 1024, 1024), True),
        ((35, 65, 650, 650), False),  # too many rows
        ((35, 8, 512, 512), False),  # 8.4 MB are too few
    ],
)
def test_large_weights_multiply_the_input_of_several_steps(size, together):
    fields, _ = sizes.forward_sizes(signature(*size))
    assert ("input_steps" in fields) == together
