"""Layers with int8 weights on the native backend: exact sums, errors beside float64, and bits that nothing changes."""

import pytest
import torch

from fastlstm.backends import csrc, native, reference
from fastlstm.backends.base import Layer
from fastlstm.cells import gru, lstm
from tests.helpers.layers import needs_native
from tests.helpers.native import instruction_sets

pytestmark = needs_native
CELLS = pytest.mark.parametrize("cell", [lstm, gru], ids=["lstm", "gru"])
BITS = pytest.mark.parametrize("activations", [8, 16])
TOP = {8: 127, 16: 127 * 256}
# T, B, I, H: one of each; less than a group of four columns and more; several chunks of rows; more than 520 columns
SIZES = [(1, 1, 1, 1), (3, 7, 7, 9), (9, 2, 650, 7), (28, 3, 28, 128), (4, 70, 33, 100), (2, 130, 100, 65)]
SIZES += [(3, 5, 7, 650)]


def rounded(weight):
    """int8 numbers and the scale of each row, in torch."""
    largest = weight.abs().amax(1)
    scale = torch.where(largest == 0, 1, largest / 127)
    return (weight / scale[:, None]).round().to(torch.int8), scale


def draw(cell, T, B, I, H, *, masked=False, reverse=False, states=True, biases=True):
    """A layer with torch's initial weights in float32, and the same in int8."""
    rows, limit = cell.gates_of_x * H, H**-0.5
    uniform = lambda *shape: (torch.rand(shape) * 2 - 1) * limit  # noqa: E731
    weight_ih, weight_hh = uniform(rows, I), uniform(rows, H)
    bias = (uniform(rows), uniform(rows)) if biases else (None, None)
    (numbers_ih, scale_ih), (numbers_hh, scale_hh) = rounded(weight_ih), rounded(weight_hh)
    first = tuple(torch.rand(B, H) * 2 - 1 if states else None for _ in cell.states)
    lengths = torch.randint(0, T + 1, (B,)) if masked else None
    reset = torch.rand(T, B) < 0.2 if masked else None
    plain = Layer(torch.randn(T, B, I), (weight_ih, weight_hh, *bias), first, lengths, reset, reverse, cell)
    return plain, plain._replace(weights=(numbers_ih, numbers_hh, *bias), scales=(scale_ih, scale_hh))


def exact(layer):
    """An int8 layer in float64, where x and h are not rounded."""
    numbers, scales = layer.weights[:2], layer.scales
    weights = (a.double() * scale[:, None].double() for a, scale in zip(numbers, scales))
    return layer._replace(weights=(*weights, *layer.weights[2:]), scales=()).to(torch.double)


def forward(layer, activations):
    return native.forward(layer._replace(activations=activations), False)


def results(run):
    return run.h, *run.last


def planned(layer, activations, kept):
    """A run by a new plan, which takes and gives states with an axis in front."""
    states = tuple(a if a is None else a[None] for a in layer.states)
    layer = layer._replace(states=states, activations=activations)
    run = native.plan(layer, False, kept, (1,)).forward(layer)
    return run._replace(last=tuple(a[0] for a in run.last))


def alike(a, b):
    """Whether two runs, or lists of results, have the same bits. NaN is like NaN."""
    return all(torch.equal(x.nan_to_num(nan=2.0**99), y.nan_to_num(nan=2.0**99)) for x, y in zip(a, b, strict=True))


def rows_of(layer, b):
    """The layer of batch row b alone."""
    cut = lambda a, axis: None if a is None else a.narrow(axis, b, 1)  # noqa: E731
    states = tuple(cut(a, 0) for a in layer.states)
    return layer._replace(x=cut(layer.x, 1), states=states, lengths=cut(layer.lengths, 0), reset=cut(layer.reset, 1))


@pytest.fixture(params=instruction_sets())
def instructions(request, monkeypatch):
    monkeypatch.setattr(csrc, "instructions", request.param)
    return request.param


@CELLS
@BITS
@pytest.mark.parametrize("columns", [1, 7, 100, 650])
@pytest.mark.parametrize("extreme", [False, True])
def test_sums_are_exact(cell, activations, columns, extreme, instructions):
    """x and h are integers and all scales 1, so a pre-activation is a sum of integers. The biases take it away: what is
    left is 0 only if the sum is right to the last unit. The sums fit in float32."""
    H, top = columns, TOP[activations]
    rows = cell.gates_of_x * H
    most = 127 if activations == 8 or extreme else 300
    if extreme:  # all products at their largest, of either sign
        x, h_0 = torch.full((1, 1, columns), 127.0), torch.full((1, H), -127.0)
        weight_ih = weight_hh = torch.where(torch.arange(rows) % 2 == 0, 127, -127)[:, None].expand(rows, columns)
    else:
        x, h_0 = torch.randint(-most, most + 1, (1, 1, columns)), torch.randint(-most, most + 1, (1, H))
        weight_ih, weight_hh = torch.randint(-127, 128, (rows, columns)), torch.randint(-127, 128, (rows, H))
    x, h_0 = x.float(), h_0.float()
    x[..., 0], h_0[..., -1] = top, -top  # the scale of the row is 1
    sum_ih, sum_hh = weight_ih.double() @ x[0, 0].double(), weight_hh.double() @ h_0[0].double()
    assert max(sum_ih.abs().max(), sum_hh.abs().max(), (sum_ih + sum_hh).abs().max()) < 2**24
    one = torch.ones(rows)
    weights = weight_ih.to(torch.int8).contiguous(), weight_hh.to(torch.int8).contiguous()
    biases = (-sum_ih - sum_hh).float(), torch.zeros(rows)
    if cell is gru:  # the products of the last block do not meet
        biases = -sum_ih.float(), -sum_hh.float()
    states = h_0, *torch.randn(len(cell.states) - 1, 1, H)
    layer = Layer(x, (*weights, *biases), states, None, None, False, cell, scales=(one, one))
    h, *c = results(forward(layer, activations))[1:]
    if cell is gru:
        assert torch.equal(h, h_0 / 2)
    else:
        assert torch.equal(c[0], states[1] / 2)
        torch.testing.assert_close(h, torch.tanh(states[1].double() / 2).float() / 2, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("activations", "other"), [(8, 127), (16, 127 * 256), (16, -127 * 256 + 128)])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_65536_columns_do_not_overflow(activations, other, sign, instructions):
    """All bytes of x are 127, or every other one of the lower bytes is -128. float32 holds all sums."""
    columns = 1 << 16
    x = torch.where(torch.arange(columns) % 2 == 0, TOP[activations], other).float().view(1, 1, columns)
    weight_ih, one, zero = torch.full((4, columns), 127 * sign, dtype=torch.int8), torch.ones(4), torch.zeros(4)
    bias = -(weight_ih.double() @ x[0, 0].double()).float()
    weights = weight_ih, torch.zeros(4, 1, dtype=torch.int8), bias, zero
    layer = Layer(x, weights, (torch.zeros(1, 1), torch.ones(1, 1)), None, None, False, lstm, scales=(one, one))
    assert forward(layer, activations).last[1].item() == 0.5


@CELLS
@BITS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_bits_depend_on_nothing_else(cell, activations, size, masked, reverse, monkeypatch, set_threads):
    """Not on the instruction set, threads, other rows, or whether packed weights are kept; nor do those of NaN."""
    _, layer = draw(cell, *size, masked=masked, reverse=reverse)
    layer.x[0, 0, 0], layer.states[0][-1, -1] = torch.inf, torch.nan
    set_threads(1)
    want = results(forward(layer, activations))
    for b in {0, size[1] // 2, size[1] - 1}:
        alone = forward(rows_of(layer, b), activations)
        assert alike((alone.h[:, 0], *(a[0] for a in alone.last)), [want[0][:, b], *(a[b] for a in want[1:])])
    for threads in (1, 2, 3):
        set_threads(threads)
        for instructions in instruction_sets():
            monkeypatch.setattr(csrc, "instructions", instructions)
            kept = {}
            runs = [forward(layer, activations)]
            runs += [planned(layer, activations, kept) for _ in range(2)]
            assert all(alike(results(run), want) for run in runs), (threads, instructions)


@CELLS
@BITS
def test_nan_of_one_unit_reaches_all_at_the_next_step(cell, activations, instructions):
    _, layer = draw(cell, 3, 5, 7, 40)
    bias = layer.weights[2].clone()
    bias[3] = float("nan")
    h = forward(layer._replace(weights=(*layer.weights[:2], bias, *layer.weights[3:])), activations).h
    assert h[0].isnan().sum() == 5
    assert h[0, :, 3].isnan().all()
    assert h[1:].isnan().all()


@CELLS
@BITS
def test_rows_of_zeros_and_of_next_to_nothing(cell, activations, instructions):
    """They count as zeros, which is what no rounding is needed for. Rows of any larger size are scaled."""
    _, layer = draw(cell, 4, 3, 7, 9, states=False)
    zeros = results(forward(layer._replace(x=torch.zeros(4, 3, 7)), activations))
    for factor in (1e-45, 1e-38, 1e-33):
        tiny = layer._replace(x=torch.full((4, 3, 7), factor))
        assert alike(results(forward(tiny, activations)), zeros)
    scale_ih, scale_hh = layer.scales
    for power in (-90, -20, 60):  # of two: the numbers of x are the same, and the scales make up for it
        other = layer._replace(x=layer.x * 2.0**power, scales=(scale_ih * 2.0**-power, scale_hh))
        assert alike(results(forward(other, activations)), results(forward(layer, activations)))


@CELLS
@BITS
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_large_offsets_of_x(cell, activations, offset):
    """x far from zero is rounded by its largest number: the layer is that of the rounded x."""
    _, layer = draw(cell, 3, 4, 30, 20)
    layer = layer._replace(x=layer.x + offset)
    most, top = layer.x.abs().amax(-1, keepdim=True), TOP[activations]
    rounded_x = (layer.x * (top / most)).round().double() * (most / top).double()
    want = reference.forward(exact(layer)._replace(x=rounded_x), False)
    h = forward(layer, activations).h
    assert (h - want.h).abs().max() < 1e-2  # from rounding h, and from float32: pre-activations are up to 1e4


@CELLS
def test_strides_and_no_rows(cell):
    _, layer = draw(cell, 4, 6, 5, 9, masked=True)
    want = results(forward(layer, 8))
    spread = lambda a: None if a is None else torch.stack([a, a], -1)[..., 0]  # noqa: E731
    weights, states, scales = (tuple(map(spread, each)) for each in (layer.weights, layer.states, layer.scales))
    for x in (spread(layer.x), layer.x.transpose(0, 1).contiguous().transpose(0, 1)):
        other = layer._replace(
            x=x, weights=weights, states=states, scales=scales, lengths=spread(layer.lengths), reset=spread(layer.reset)
        )
        assert alike(results(forward(other, 8)), want)
    _, layer = draw(cell, 4, 0, 5, 9)
    assert [a.shape for a in results(forward(layer, 8))] == [(4, 0, 9), *[(0, 9)] * len(cell.states)]


def test_more_columns_than_sums_hold_are_refused():
    columns = (1 << 16) + 1
    weights = *(torch.zeros(4, k, dtype=torch.int8) for k in (columns, 1)), None, None
    x, scales = torch.zeros(1, 1, columns), tuple(torch.ones(2, 4))
    layer = Layer(x, weights, (None, None), None, None, False, lstm, scales=scales, activations=8)
    for kept in (None, {}):
        with pytest.raises(RuntimeError, match=r"fastlstm_(forward|pack): a size, stride or pointer cannot be"):
            native.plan(layer, False, kept, ()).forward(layer)
    assert csrc.library.fastlstm_packed_size(2, 0, 0, columns, 1) == 0
