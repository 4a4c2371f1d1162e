"""What int8 modules compute: their error, beside plain PyTorch, and its bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlstm
from tests.helpers.modules import flat
from tests.helpers.quantized import KERNELS, both_activations, both_kinds, kernels, quantized, same_bits
from tests.helpers.threads import on_any_split, splits

# The largest error of h, of random weights over 1000 steps at H 128. An LSTM's is halved by its output gate; a GRU's h
# is what it remembers, too.
ERRORS = {
    (fastlstm.LSTM, "int8"): 1e-2,
    (fastlstm.LSTM, "int16"): 5e-3,
    (fastlstm.GRU, "int8"): 2e-2,
    (fastlstm.GRU, "int16"): 1e-2,
}
# Two ways to compute the same differ in the last bits of h. Where these decide how a number is rounded, sums differ by
# a step of that number: by a 127th of a weight.
ONE_STEP = {"int8": 1e-2, "int16": 1e-4}


@torch.no_grad()
@both_kinds
@both_activations
@pytest.mark.parametrize("backend", [*KERNELS, pytest.param("reference", marks=[pytest.mark.slow] * len(KERNELS))])
def test_the_error_over_a_thousand_steps(kind, activations, backend):
    torch.manual_seed(0)
    module, x = kind(128, 128), torch.randn(1000, 1, 128)
    exact = kind(128, 128, dtype=torch.float64, backend="reference")
    exact.load_state_dict(module.state_dict())
    truth = exact(x.double())[0]
    output = quantized(module, activations, backend)(x)[0]
    assert (output - truth).abs().max() <= ERRORS[kind, activations]


def draw(seed, T, B, I, H, kind, scale=1.0, states=True, masks=True, bias=True):
    """A bidirectional module, and a call of it, with padding that is NaN."""
    torch.manual_seed(seed)
    module = kind(I, H, bidirectional=True, bias=bias)
    x = torch.randn(T, B, I) * scale
    hx = None
    if states:
        hx = tuple(torch.randn(2, B, H) * scale for _ in range(1 if kind is fastlstm.GRU else 2))
        hx = hx[0] if kind is fastlstm.GRU else hx
    lengths = None
    if masks:
        lengths = torch.randint(0, T + 1, (B,))
        x.masked_fill_((torch.arange(T).unsqueeze(1) >= lengths).unsqueeze(-1), float("nan"))
    return module, (x, hx), {"lengths": lengths}


@torch.no_grad()
@kernels
@both_kinds
@both_activations
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (6, 1, 16, 16), (7, 3, 5, 9), (4, 20, 28, 40), (3, 70, 33, 50), (3, 2, 600, 130)],
    ids=str,
)
def test_kernels_beside_plain_pytorch(kind, activations, states, masks, size, backend, poisoned):
    module, inputs, options = draw(1, *size, kind, states=states, masks=masks)
    got, want = (flat(quantized(module, activations, each)(*inputs, **options)) for each in (backend, "reference"))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= ONE_STEP[activations]


@kernels
@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 40), st.integers(2, 40), st.sampled_from([fastlstm.LSTM, fastlstm.GRU]),
    st.sampled_from([("int8", 127), ("int16", 127 * 256)]), st.integers(0, 1 << 30), splits,
)  # fmt: skip
@on_any_split
@torch.no_grad()
def test_numbers_between_two_integers_are_rounded_alike(backend, I, H, kind, rounding, seed):
    """One step, whose x and h are, in steps of their rows' scales, the float32 nearest to k + 1/2 or one beside it."""
    torch.manual_seed(seed)
    (activations, top), module = rounding, kind(I, H)

    def near_ties(columns):
        largest = 1 + 4 * torch.rand(1, 500, 1)
        k = torch.randint(-top, top, (1, 500, columns - 1))
        values = ((k + 0.5) * largest.double() / top).float()
        return torch.cat([largest, values.nextafter(values + torch.randint(-1, 2, values.shape))], -1)

    x, h_0 = near_ties(I), near_ties(H)
    hx = h_0 if kind is fastlstm.GRU else (h_0, torch.randn(1, 500, H))
    got, want = (quantized(module, activations, each)(x, hx)[0] for each in (backend, "reference"))
    assert (got - want).abs().max() < 5e-6  # roundings of numbers up to 10; a step is 3e-5 times a weight


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 90), st.integers(1, 90)),
    st.sampled_from([fastlstm.LSTM, fastlstm.GRU]),
    st.sampled_from(["int8", "int16"]),
    st.sampled_from([1e-40, 1e-20, 1.0, 1e3, 1e20]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 30),
    splits,
)
@on_any_split
@torch.no_grad()
def test_a_row_alone_and_among_others(size, kind, activations, scale, states, masks, bias, seed):
    module, (x, hx), options = draw(seed, *size, kind, scale, states, masks, bias)
    for backend in KERNELS:
        made = quantized(module, activations, backend)
        together = flat(made(x, hx, **options))
        b = seed % size[1]

        def of_row(a, b=b):
            return a if a is None else a[:, b : b + 1]

        state = of_row(hx) if kind is fastlstm.GRU else None if hx is None else tuple(map(of_row, hx))
        lengths = options["lengths"]
        alone = flat(made(of_row(x), state, lengths=None if lengths is None else lengths[b : b + 1]))
        assert same_bits(alone, map(of_row, together))


@torch.no_grad()
@kernels
@both_kinds
def test_a_reset_ends_what_is_not_finite(kind, backend):
    torch.manual_seed(0)
    made, x, reset = (
        quantized(kind(20, 24), backend=backend),
        torch.randn(8, 2, 20),
        torch.zeros(8, 2, dtype=torch.bool),
    )
    x[2, 0] = float("nan")
    reset[5, 0] = True
    output = made(x, reset=reset)[0]
    assert same_bits([output[5:, :1]], [made(x[5:, :1])[0]])
    assert same_bits([output[:, 1:]], [made(x[:, 1:])[0]])


@torch.no_grad()
@kernels
@both_activations
def test_a_gru_that_starts_beyond_one(activations, backend):
    """Its h is scaled by its largest number at each step, until it is within one."""
    torch.manual_seed(0)
    module, x, h_0 = fastlstm.GRU(16, 40), torch.randn(50, 3, 16), torch.randn(1, 3, 40)
    h_0[0, 1] *= 1000
    got, want = (flat(quantized(module, activations, each)(x, h_0)) for each in (backend, "reference"))
    for a, b in zip(got, want):
        assert (a[:, [0, 2]] - b[:, [0, 2]]).abs().max() <= ONE_STEP[activations]
        # numbers to 3000, rounded in steps of 3000 / 127: one step differs by a few weights
        assert (a - b).abs().max() <= 3000 * ONE_STEP[activations]


@torch.no_grad()
@kernels
def test_changed_weights_are_seen(backend):
    torch.manual_seed(0)
    made, x = quantized(fastlstm.LSTM(33, 40), backend=backend), torch.randn(4, 2, 33)
    made(x)
    for name, buffer in made.named_buffers():
        if buffer.numel():
            flat_buffer = buffer.view(-1)
            flat_buffer[-1] += 3
            again = quantized(fastlstm.LSTM(33, 40), backend=backend)
            again.load_state_dict(made.state_dict())
            assert same_bits(flat(made(x)), flat(again(x))), name


@torch.no_grad()
@kernels
@pytest.mark.parametrize(("I", "H"), [(1, 1), (3, 3), (5, 7)])
def test_changed_weights_of_odd_numbers_of_bytes_are_seen(I, H, backend):
    torch.manual_seed(0)
    made, x = quantized(fastlstm.GRU(I, H), backend=backend), torch.randn(2, 1, I)
    for k in range(1, min(4, 3 * H * I) + 1):
        made(x)
        made.weight_ih_l0.view(-1)[-k] -= 50
        again = quantized(fastlstm.GRU(I, H), backend=backend)
        again.load_state_dict(made.state_dict())
        assert same_bits(flat(made(x)), flat(again(x)))


@torch.no_grad()
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_h_is_rounded_as_if_its_largest_were_one(backend):
    """A state below half of a 127th counts as zero, however small the row's others are."""
    module, x = quantized(fastlstm.LSTM(5, 7), backend=backend), torch.randn(1, 2, 5)
    zeros, below, above = (
        module(x, (torch.full((1, 2, 7), value), torch.zeros(1, 2, 7)))[0] for value in (0.0, 3e-3, 5e-3)
    )
    assert torch.equal(below, zeros)
    assert not torch.equal(above, zeros)
