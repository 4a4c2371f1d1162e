"""Rows that end early and states that are reset, in both kinds of Triton kernels, against the reference in float64.

Without a GPU they run in Triton's interpreter, which multiplies bf16 as integers: 16 bits are tested in fp16.
"""

import importlib.util
import warnings

import pytest
import torch

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Gradients, Layer, Run, held_steps, reset_steps
from fastlstm.backends.triton import tiles

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is made for Linux on x86-64", allow_module_level=True)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = Gradients(True, (True,) * 4, (True, True))
STEPWISE = tiles.Stepwise(units=32, block_b=16, block_k=16, forward_warps=4, backward_warps=4, stages=3)
# Outputs and gradients, of the largest value: float32's roundings over sums of some hundred terms; those of tf32's and
# fp16's 11 bits, of which a few add up in the steps.
BOUNDS = {
    "ieee": (torch.float32, 2e-6, 2e-5),
    "tf32": (torch.float32, 3e-3, 3e-3),
    "native": (torch.float16, 4e-3, 8e-3),
}


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialised memory is NaN: what a kernel forgets to write shows. The interpreter warns of NaN and infinity."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
        warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["resident", "stepwise"])
def kernels(request, monkeypatch):
    """Both kinds of kernels at small sizes, where the interpreter is fast."""
    if request.param == "stepwise":
        monkeypatch.setattr(tiles, "choose", lambda *_: STEPWISE)


def drawn(T, B, I, H, *, kind="ieee", G=None, masks="both", biases=2, states=True, reverse=False):
    """A layer, and gradients for all that comes out of it. Its padding is NaN."""
    dtype, stack = BOUNDS[kind][0], () if G is None else (G,)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape) * scale).to(DEVICE, dtype)

    lengths = reset = None
    if masks in ("lengths", "both"):
        ends = torch.tensor([T, 0, T - 1, 1, -3, T + 5, (T + 1) // 2])
        lengths = ends[torch.arange(B) % len(ends)].to(DEVICE)
    if masks in ("reset", "both"):
        reset = (torch.rand(T, B) < 0.4).to(DEVICE)
    k = H**-0.5
    weights = draw(*stack, 4 * H, I, scale=k), draw(*stack, 4 * H, H, scale=k)
    weights += tuple(draw(*stack, 4 * H, scale=k) if n < biases else None for n in (1, 0))  # bias_hh alone where one
    h_0, c_0 = (draw(B, H, scale=0.5), draw(B, H, scale=0.5)) if states else (None, None)
    layer = Layer(draw(T, B, I), weights, (h_0, c_0), lengths, reset, reverse, cells.lstm)
    if lengths is not None:
        layer.x.masked_fill_(held_steps(layer), float("nan"))
    return layer, Run(draw(T, B, H), (draw(B, H), draw(B, H)), (draw(T, B, H),))


def doubled(part):
    if isinstance(part, tuple):
        fields = map(doubled, part)
        return type(part)(*fields) if hasattr(part, "_fields") else tuple(fields)
    return part.double() if isinstance(part, torch.Tensor) and part.is_floating_point() else part


def flat(run, gradients):
    """By name; gates have a layout and padding of their own."""
    named = {"h": run.h, "h_n": run.last[0], "c_n": run.last[1], "c": run.kept[0]}
    names = ("dx", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dh_0", "dc_0")
    return named | dict(zip(names, gradients.flat, strict=True))


def results(module, layer, grads, needs=ALL, **precision):
    run = module.forward(layer, True, **precision)
    return flat(run, module.backward(grads, layer, run, needs, **precision))


def check(layer, grads, kind):
    precision, bounds = "ieee" if kind == "native" else kind, BOUNDS[kind][1:]
    got = results(backend, layer, grads, precision=precision)
    for name, want in results(reference, doubled(layer), doubled(grads)).items():
        if want is None or (layer.states[0] is None and name in ("dh_0", "dc_0")):
            assert got[name] is None, name
            continue
        assert got[name].shape == want.shape, name
        largest = want.abs().max().clamp(min=1e-30)
        difference = (got[name].double() - want).abs().max() / largest
        assert difference < bounds[name.startswith("d")], (name, difference)  # False for NaN
    return got


@pytest.mark.sampled(11)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masks", ["none", "lengths", "reset", "both"])
@pytest.mark.parametrize(
    ("kind", "size"),
    [("ieee", (5, 16, 3, 7)), ("ieee", (4, 9, 28, 33)), ("tf32", (4, 9, 28, 33)), ("native", (4, 9, 28, 33))],
)
def test_against_the_reference(kind, size, masks, reverse, kernels):
    layer, grads = drawn(*size, kind=kind, masks=masks, reverse=reverse)
    got = check(layer, grads, kind)
    held = held_steps(layer)
    if held is not None:
        assert not got["h"].masked_select(held).any()
        assert not got["dx"].masked_select(held).any()


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("masks", ["lengths", "reset", "both"])
@pytest.mark.parametrize(
    ("kind", "size"), [("native", (3, 8, 28, 128)), ("tf32", (3, 9, 40, 100)), ("ieee", (3, 34, 5, 260))]
)
def test_larger_layers(kind, size, masks, reverse):
    check(*drawn(*size, kind=kind, masks=masks, reverse=reverse), kind)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", BOUNDS)
def test_stacks(kind, reverse, kernels):
    """x has the batch rows of a stack on one axis, or the groups on an axis of their own."""
    layer, grads = drawn(3, 14, 5, 20, kind=kind, G=2, reverse=reverse)
    got = check(layer, grads, kind)
    apart = layer._replace(x=layer.x.unflatten(1, (2, 7)))
    again = results(backend, apart, grads, precision="ieee" if kind == "native" else kind)
    assert all(torch.equal(a, again[name].view_as(a)) for name, a in got.items())


@pytest.mark.sampled(5)
@pytest.mark.parametrize("I", [5, 40])
@pytest.mark.parametrize("biases", [0, 1, 2])
def test_biases_and_states_may_be_absent(biases, I, kernels):
    check(*drawn(3, 9, I, 20, kind="native", biases=biases, states=False), "native")


def test_one_gradient_at_a_time(kernels):
    layer, grads = drawn(3, 9, 5, 20, reverse=True)
    run = backend.forward(layer, True, precision="ieee")
    want = backend.backward(grads, layer, run, ALL, precision="ieee").flat
    for needed in range(7):
        needs = Gradients.of(cells.lstm, [n == needed for n in range(7)])
        got = backend.backward(grads, layer, run, needs, precision="ieee").flat
        assert [n for n, gradient in enumerate(got) if gradient is not None] == [needed]
        assert torch.equal(got[needed], want[needed])


def test_the_gradients_of_two_biases_share_no_memory(kernels):
    got = results(backend, *drawn(3, 9, 5, 20), precision="ieee")
    assert torch.equal(got["dbias_ih"], got["dbias_hh"])
    assert got["dbias_ih"].data_ptr() != got["dbias_hh"].data_ptr()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["ieee", "tf32"])
def test_the_gradient_of_a_held_output_reaches_nothing(kind, reverse, kernels):
    layer, grads = drawn(4, 9, 5, 33, kind=kind, reverse=reverse)
    other = grads._replace(h=grads.h.masked_fill(held_steps(layer), float("nan")))
    first, second = (results(backend, layer, g, precision=kind) for g in (grads, other))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_that_no_step_sees_reaches_nothing_else(reverse, kernels):
    """Rows without steps, and rows whose first step is reset, may start from infinity."""
    layer, grads = drawn(4, 9, 5, 33, reverse=reverse)
    first = (layer.lengths.clamp(1, 4) - 1 if reverse else torch.zeros_like(layer.lengths)).unsqueeze(0)
    unseen = (layer.lengths <= 0) | layer.reset.gather(0, first)[0]
    assert reset_steps(layer, held_steps(layer)).any()
    h_0, c_0 = (a.masked_fill(unseen.unsqueeze(-1), float("inf")) for a in layer.states)
    results_of = [
        results(backend, layer._replace(states=s), grads, precision="ieee") for s in (layer.states, (h_0, c_0))
    ]
    steps = slice(None), layer.lengths > 0  # c of a held row is its c_0
    for name, a in results_of[0].items():
        b = results_of[1][name]
        if name in ("h_n", "c_n", "dh_0", "dc_0"):
            a, b = a[steps[1]], b[steps[1]]
        if name == "c":
            live = ~held_steps(layer)
            a, b = a.masked_select(live), b.masked_select(live)
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", BOUNDS)
def test_states_of_any_size_are_carried(kind, kernels):
    """In reverse h_0 waits for a row's first step, in fp16 as packed weights take it."""
    layer, _ = drawn(3, 9, 5, 17, kind=kind, masks="lengths", reverse=True)
    large = layer.states[0].clone().fill_(0)
    large[:, 4] = 3e4
    layer.weights[1].mul_(0.0).add_(1e-5)  # of fp16 a subnormal, so that the sum stays about one
    layer = layer._replace(states=(large, layer.states[1]))
    run, want = (
        backend.forward(layer, True, "ieee" if kind == "native" else kind),
        reference.forward(doubled(layer), True),
    )
    assert (run.h.double() - want.h).abs().max() < BOUNDS[kind][1]
    assert torch.equal(run.last[0][1], large[1])  # a row of no steps


@pytest.mark.parametrize("masks", ["none", "both"])
def test_no_rows(masks, kernels):
    layer, grads = drawn(3, 0, 5, 20, masks=masks)
    got = results(backend, layer, grads, precision="ieee")
    assert got["h"].shape == (3, 0, 20)
    assert not got["dweight_hh"].any()
