"""Rows that end early and states that are reset, in both kinds of Triton kernels, against the reference in float64."""

import pytest
import torch

from fastlstm import cells
from fastlstm.backends.base import Gradients, Layer, Run, held_steps, reset_steps
from tests.backends.triton.shared import BOUNDS, backend, check, converted, on_device, results
from tests.helpers.leaking import leaking_products

pytestmark = pytest.mark.usefixtures("poisoned")


def drawn(T, B, I, H, *, dtype=torch.float32, G=None, masks="both", biases=2, states=True, reverse=False):
    """A layer, and gradients for all that comes out of it. Its padding is NaN."""
    stack = () if G is None else (G,)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(dtype)

    lengths = reset = None
    if masks in ("lengths", "both"):
        ends = torch.tensor([T, 0, T - 1, 1, -3, T + 5, (T + 1) // 2])
        lengths = ends[torch.arange(B) % len(ends)]
    if masks in ("reset", "both"):
        reset = torch.rand(T, B) < 0.4
    k = H**-0.5
    weights = draw(*stack, 4 * H, I, scale=k), draw(*stack, 4 * H, H, scale=k)
    weights += tuple(draw(*stack, 4 * H, scale=k) if n < biases else None for n in (1, 0))  # bias_hh alone where one
    h_0, c_0 = (draw(B, H, scale=0.5), draw(B, H, scale=0.5)) if states else (None, None)
    layer = Layer(draw(T, B, I), weights, (h_0, c_0), lengths, reset, reverse, cells.lstm)
    if lengths is not None:
        layer.x.masked_fill_(held_steps(layer), float("nan"))
    return on_device(layer), converted(Run(draw(T, B, H), (draw(B, H), draw(B, H)), (draw(T, B, H),)), dtype)


def equal(first, second):
    return all(torch.equal(a, b) for one, other in zip(first, second) for a, b in zip(one, other) if a is not None)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masks", ["none", "lengths", "reset", "both"])
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("ieee", size) for size in ((1, 1, 1, 1), (5, 16, 3, 7), (4, 9, 28, 64), (2, 3, 40, 100), (5, 17, 7, 33))),
        *((kind, size) for kind in ("tf32", "native") for size in ((3, 7, 1, 7), (4, 9, 28, 33))),
    ],
)
def test_against_the_reference(kind, size, masks, reverse, kernels):
    layer, grads = drawn(*size, dtype=BOUNDS[kind][0], masks=masks, reverse=reverse)
    (h, *_), (dx, *_) = check(layer, grads, kind)
    held = held_steps(layer)
    if held is not None:
        assert not h.masked_select(held).any()
        assert not dx.masked_select(held).any()


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masks", ["none", "lengths", "reset", "both"])
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("native", size) for size in ((20, 17, 28, 128), (3, 8, 28, 128), (3, 5, 40, 260))),
        *(("tf32", size) for size in ((3, 9, 40, 100), (2, 34, 3, 130), (3, 5, 40, 260))),
        *(("ieee", size) for size in ((3, 34, 5, 260), (2, 100, 100, 33), (3, 2, 7, 650))),
    ],
)
def test_larger_layers(kind, size, masks, reverse):
    check(*drawn(*size, dtype=BOUNDS[kind][0], masks=masks, reverse=reverse), kind)


@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (4, 9, 28, 64), (5, 17, 7, 33), pytest.param((20, 17, 28, 128), marks=pytest.mark.slow)]
)
def test_bf16(size, kernels, monkeypatch):
    monkeypatch.setitem(BOUNDS, "native", (torch.bfloat16, 4e-2, 8e-2))  # eight times fp16's: three bits fewer
    check(*drawn(*size, dtype=torch.bfloat16), "native")


@pytest.mark.parametrize("G", [None, 2])
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_reaches_nothing_where_torchs_products_leak(reverse, G, kernels, monkeypatch):
    """On an odd number of inputs, which no resident kernel takes whole, and with an odd number of rows and steps."""
    monkeypatch.setitem(BOUNDS, "native", (torch.bfloat16, 4e-2, 8e-2))  # as above
    layer, grads = drawn(5, 14 if G else 7, 35, 33, dtype=torch.bfloat16, G=G, reverse=reverse)
    with leaking_products():
        check(layer, grads, "native")


@pytest.mark.sampled(5)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", BOUNDS)
def test_stacks(kind, reverse, kernels):
    """x has the batch rows of a stack on one axis, or the layers on an axis of their own."""
    layer, grads = drawn(3, 14, 5, 20, dtype=BOUNDS[kind][0], G=2, reverse=reverse)
    found = check(layer, grads, kind)
    apart = layer._replace(x=layer.x.unflatten(1, (2, 7)))
    assert equal(found, results(apart, grads, kind))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("I", [5, 40])
@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize("kind", BOUNDS)
def test_biases_and_states_may_be_absent(kind, biases, I, kernels):
    """Up to 32 inputs the resident kernel does their product in 16 bits."""
    for states in (False, True):
        check(*drawn(3, 9, I, 20, dtype=BOUNDS[kind][0], biases=biases, states=states), kind)


def test_one_gradient_at_a_time(kernels):
    layer, grads = drawn(3, 9, 5, 20, reverse=True)
    run = backend.forward(layer, True, precision="ieee")
    want = backend.backward(grads, layer, run, Gradients.of(cells.lstm, [True] * 7), precision="ieee").flat
    for needed in range(7):
        needs = Gradients.of(cells.lstm, [n == needed for n in range(7)])
        got = backend.backward(grads, layer, run, needs, precision="ieee").flat
        assert [n for n, gradient in enumerate(got) if gradient is not None] == [needed]
        assert torch.equal(got[needed], want[needed])
    assert torch.equal(want[3], want[4])  # of the two biases, which share no memory
    assert want[3].data_ptr() != want[4].data_ptr()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["ieee", "tf32"])
def test_the_gradient_of_a_held_output_reaches_nothing(kind, reverse, kernels):
    layer, grads = drawn(4, 9, 5, 33, reverse=reverse)
    other = grads._replace(h=grads.h.masked_fill(held_steps(layer), float("nan")))
    assert equal(results(layer, grads, kind), results(layer, other, kind))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_that_no_step_sees_reaches_nothing_else(reverse, kernels):
    """Rows without steps, and rows whose first step is reset, may start from infinity."""
    layer, grads = drawn(4, 9, 5, 33, reverse=reverse)
    first = (layer.lengths.clamp(1, 4) - 1 if reverse else torch.zeros_like(layer.lengths)).unsqueeze(0)
    held, unseen = held_steps(layer), (layer.lengths <= 0) | layer.reset.gather(0, first)[0]
    assert reset_steps(layer, held).any()
    of_states = layer.states, tuple(a.masked_fill(unseen.unsqueeze(-1), float("inf")) for a in layer.states)
    found = [results(layer._replace(states=states), grads, "ieee") for states in of_states]
    rows, kept = layer.lengths > 0, []  # c of a held row is its c_0
    for (h, h_n, c_n, c), (*others, dh_0, dc_0) in found:
        kept.append(([h, h_n[rows], c_n[rows], c.masked_select(~held)], [*others, dh_0[rows], dc_0[rows]]))
    assert equal(*kept)


@pytest.mark.parametrize("kind", ["ieee", "tf32"])
def test_states_of_any_size_are_carried(kind, kernels):
    """In reverse h_0 waits for a row's first step, far outside the range of the 16 bits that products are made of."""
    layer, grads = drawn(3, 9, 5, 17, masks="lengths", reverse=True)
    large = torch.zeros_like(layer.states[0])
    large[:, 4] = 1e6
    layer.weights[1].fill_(0.3 / 1e6)  # so that a pre-activation stays about one
    check(layer._replace(states=(large, layer.states[1])), grads, kind)
