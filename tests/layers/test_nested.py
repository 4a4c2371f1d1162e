"""Nested tensors of the layout torch.jagged: each row gives what it gives alone."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastlstm
from tests.helpers.contract import LAYERS
from tests.helpers.modules import OURS, flat
from tests.helpers.tolerances import close

LENGTHS = [4, 1, 6, 6, 2]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")


def nested(rows, **options):
    return torch.nested.nested_tensor(rows, layout=torch.jagged, **options)


def rows_of(size, dtype=torch.float64):
    return [torch.randn(n, size, dtype=dtype) for n in LENGTHS]


def layer(name, *sizes, **options):
    kind, more = LAYERS[name]
    return OURS[kind](*sizes, **more, **options)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_row_is_as_if_alone(name, batch_first, dtype):
    module = layer(name, 7, 13, 2, batch_first=batch_first, bidirectional=True, dtype=dtype)
    count, rows = 2 if name == "LSTM" else 1, rows_of(7, dtype)
    states = [torch.randn(4, len(rows), 13, dtype=dtype, requires_grad=True) for _ in range(count)]
    x = nested(rows, requires_grad=True)
    output, last = module(x, tuple(states) if name == "LSTM" else states[0])
    assert output.shape == (len(rows), x.shape[1], 26)  # the same j, so that both add up
    assert output.layout is torch.jagged
    last = flat(last)
    sums = output.values().double().cos().sum() + sum(a.double().cos().sum() for a in last)
    sums.backward()
    got = [a.grad for a in (*states, *module.parameters())]
    for a in (*states, *module.parameters()):
        a.grad = None
    for k, row in enumerate(rows):
        alone = row.requires_grad_()
        hx = [a[:, k] for a in states]
        expected, expected_last = module(alone, tuple(hx) if name == "LSTM" else hx[0])
        ends = flat(expected_last)
        (expected.double().cos().sum() + sum(a.double().cos().sum() for a in ends)).backward()
        close([output[k], *(a[:, k] for a in last)], [expected, *ends], "values")
        close(x.grad[k], alone.grad, "sums")
    close(got, [a.grad for a in (*states, *module.parameters())], "gradients")


def test_states_of_all_steps():
    module, rows = fastlstm.LSTM(7, 13, dtype=torch.float64), rows_of(7)
    output, _, cells = module(nested(rows), return_cells=True)
    for k, row in enumerate(rows):
        expected, _, expected_cells = module(row, return_cells=True)
        close([output[k], cells[k]], [expected, expected_cells], "values")


def test_any_cell_and_int8():
    rows = rows_of(7, torch.float32)
    for module in (fastlstm.RNN(fastlstm.cells.gru, 7, 13), fastlstm.QuantizedGRU(nn.GRU(7, 13))):
        output, _ = module(nested(rows))
        for k, row in enumerate(rows):
            close(output[k], module(row)[0], "values")


def test_autocast():
    module, rows = fastlstm.GRU(7, 13), rows_of(7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(nested(rows))
        assert output.dtype == module(rows[0])[0].dtype
        close(output[2], module(rows[2])[0], "cast")


def test_rows_with_gaps_between_them():
    """A view of padded rows, whose output has none."""
    padded = torch.randn(3, 6, 7, dtype=torch.float64)
    begins, lengths = torch.tensor([0, 1, 0]), torch.tensor([4, 2, 6])
    module = fastlstm.GRU(7, 13, dtype=torch.float64)
    x = torch.nested.narrow(padded, 1, begins, lengths, layout=torch.jagged)
    output, _ = module(x)
    for k, (begin, length) in enumerate(zip(begins, lengths)):
        close(output[k], module(padded[k, begin : begin + length])[0], "values")


@pytest.mark.parametrize("batch_first", [True, False])
def test_wrong_inputs(batch_first):
    """Each twice: the second call finds plans."""
    module, rows = fastlstm.LSTM(7, 13, batch_first=batch_first, dtype=torch.float64), rows_of(7)
    x = nested(rows)
    wrong = [
        (torch.nested.nested_tensor(rows), {}, "must have the layout torch.jagged, got torch.strided"),
        (x.transpose(1, 2), {}, r"must be \(B, j, I\), where rows have j steps each, got \(5, 7, j"),
        (x, {"lengths": LENGTHS}, "lengths must be None for a nested tensor, which carries its own lengths"),
        (x, {"reset": [[False] * 6] * 5}, "reset must be None for a nested tensor"),
    ]
    module(torch.zeros(2, 2, 7, dtype=torch.float64))
    for given, options, message in wrong * 2:
        with pytest.raises(ValueError, match=message):
            module(given, **options)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 7, got 3"):
        module(nested(rows_of(3)))


class Noise(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


def test_weights_that_draw_random_numbers_are_computed_once():
    module, rows, results = fastlstm.GRU(7, 5, batch_first=True), rows_of(7, torch.float32), []
    parametrize.register_parametrization(module, "weight_hh_l0", Noise())
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    for x, options in ((nested(rows), {}), (padded, {"lengths": LENGTHS})):
        torch.manual_seed(0)
        results.append(module(x, **options)[1])
    assert torch.equal(*results)
