"""`torch.nn.Dropout` as a parametrization of recurrent weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import fastlstm
from fastlstm import cells
from tests.helpers.modules import pair, randn
from tests.helpers.tolerances import close


@pytest.mark.parametrize("torch_s", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_weight_drop(torch_s, packed):
    theirs, ours = pair(3, 5, like=torch_s)
    parametrize.register_parametrization(ours, "weight_hh_l0", nn.Dropout(0.5))
    x, seen = randn(6, 4, 3), []
    weight = ours.parametrizations.weight_hh_l0.original
    for seed in (1, 2, 2):
        torch.manual_seed(seed)
        dropped = F.dropout(theirs.weight_hh_l0, 0.5)
        torch.manual_seed(seed)  # one mask a call is drawn
        output = ours(pack_padded_sequence(x, torch.tensor([6, 6, 6, 6])) if packed else x)[0]
        output = output.data.view(6, 4, 5) if packed else output
        expected = torch.func.functional_call(theirs, {"weight_hh_l0": dropped}, (x,))[0]
        close(output, expected, "sums")
        got = torch.autograd.grad(output.cos().sum(), [x, weight])
        close(got, torch.autograd.grad(expected.cos().sum(), [x, theirs.weight_hh_l0]), "gradients")
        seen.append(output)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    with torch.no_grad():
        for _ in range(3):
            torch.manual_seed(2)
            close(ours(x)[0], seen[1].detach(), "sums")
        ours.eval()
        close(ours(x)[0], theirs(x)[0], "sums")
    with torch.no_grad():
        weight.mul_(0.5)  # as an optimiser does
        theirs.weight_hh_l0.mul_(0.5)
    close(ours(x)[0], theirs(x)[0], "sums")
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_weight_drop_of_cells_and_layers():
    torch.manual_seed(0)
    cell, x = fastlstm.GRUCell(3, 5), torch.randn(2, 3)
    parametrize.register_parametrization(cell, "weight_hh", nn.Dropout(1.0))
    h = torch.randn(2, 5)
    with torch.no_grad():
        no_product = nn.GRUCell(3, 5)
        no_product.load_state_dict(dict(cell.state_dict(), weight_hh=torch.zeros(15, 5)), strict=False)
    close(cell(x, h), no_product(x, h), "sums")
    for declared, weight in (
        (cells.peephole_lstm, "weight_hh"),
        (cells.gru_reset_before, "weight_n_h"),
    ):
        rnn = fastlstm.RNN(declared, 3, 5, 2)
        for k in range(2):
            parametrize.register_parametrization(rnn, f"{weight}_l{k}", nn.Dropout(0.5))
        x = torch.randn(4, 2, 3)
        assert not torch.equal(rnn(x)[0], rnn(x)[0])
        rnn.eval()
        assert torch.equal(rnn(x)[0], rnn(x)[0])
