"""`fastlstm.RNN`: layers of the library's cells and of cells declared here."""

import pickle
from functools import partial

import pytest
import torch
from torch import nn

import fastlstm
from fastlstm import cells
from tests.helpers.modules import assert_same_gradients, copies_of, flat, randn
from tests.helpers.rnn import RNN, gadget, given, no_product, of_products
from tests.helpers.tolerances import close

backends = pytest.mark.parametrize("backend", ["numba", "reference"])


@pytest.mark.parametrize(
    ("cell", "like"),
    [(cells.lstm, nn.LSTM), (cells.gru, nn.GRU), (cells.elman_tanh, nn.RNN),
     (cells.elman_relu, partial(nn.RNN, nonlinearity="relu"))],
)  # fmt: skip
@backends
def test_equals_torch_s(cell, like, backend):
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}
    modules = []
    for make in (like, partial(fastlstm.RNN, cell, backend=backend)):
        torch.manual_seed(1)
        modules.append(make(3, 5, dtype=torch.float64, **options))
    theirs, ours = modules
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    x, results = randn(4, 6, 3), []
    for module in modules:
        torch.manual_seed(2)
        results.append(flat(module(x)))
    assert_same_gradients(ours, theirs, *results[::-1], [x])


@pytest.mark.parametrize("H", [7, 18, 100, 694])
def test_initial_values_are_torch_s(H):
    """To the last bit in float64, in which two ways to a root may be rounded differently."""
    drawn = []
    for make in (nn.LSTM, partial(fastlstm.RNN, cells.lstm)):
        torch.manual_seed(0)
        drawn.append(list(make(2, H, dtype=torch.float64).parameters()))
    assert all(map(torch.equal, *drawn))


def test_parameters():
    torch.manual_seed(0)
    rnn = fastlstm.RNN(gadget, 3, 5, 2, bidirectional=True)
    shapes = {"weight_ih": (10, 3), "weight_hh": (5, 5), "bias_ih": (10,), "bias_hh": (5,), "p": (5,), "q": (5,)}
    names = [f"{name}_l{k}{s}" for k in (0, 1) for s in ("", "_reverse") for name in shapes]
    assert list(rnn.state_dict()) == rnn._flat_weights_names == names
    for name, a in rnn.named_parameters():
        wanted = (10, 10) if name.startswith("weight_ih_l1") else shapes[name.partition("_l")[0]]
        assert a.shape == wanted
        assert 0 < a.abs().max() <= 5**-0.5
    torch.manual_seed(0)
    drawn = [torch.empty_like(a).uniform_(-(5**-0.5), 5**-0.5) for a in rnn.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(rnn.parameters(), drawn, strict=True))
    before = rnn.p_l0.clone()
    rnn.reset_parameters()
    assert not torch.equal(rnn.p_l0, before)
    assert [len(weights) for weights in rnn.all_weights] == [6] * 4
    assert list(fastlstm.RNN(gadget, 3, 5, bias=False).state_dict()) == ["weight_ih_l0", "weight_hh_l0", "p_l0", "q_l0"]
    assert list(fastlstm.RNN(cells.ind_rnn, 3, 5).state_dict()) == ["weight_ih_l0", "bias_ih_l0", "u_l0"]
    assert list(fastlstm.RNN(no_product, 3, 5, bias=False).state_dict()) == ["weight_ih_l0"]
    torch.manual_seed(0)
    rnn = fastlstm.RNN(of_products, 3, 400, heads=100, bias=False)
    names = ["weight_ih_l0", "weight_hh_l0", "gain_l0", "weight_d_m_l0", "weight_y_z_l0", "weight_z_m_l0"]
    assert list(rnn.state_dict()) == names
    for name, bound in zip(names, (0.05, 0.5, 0.05, 0.5, 0.5, 0.5), strict=True):
        assert 0.9 * bound < getattr(rnn, name).abs().max() <= bound
    assert {rnn.get_parameter(name).shape for name in names[3:]} == {(400, 4)}


@backends
def test_products_that_share_a_weight(backend):
    """One parameter under two names, whose gradient is the sum of both."""
    rnn, tied = (RNN(of_products, 3, 5, backend=backend) for _ in range(2))
    rnn.load_state_dict(rnn.state_dict() | {"weight_z_m_l0": rnn.weight_y_z_l0})
    tied.load_state_dict(rnn.state_dict())
    tied.weight_z_m_l0 = tied.weight_y_z_l0
    x, states, inputs = given(rnn)
    results = [module(x, states, inputs)[0] for module in (rnn, tied)]
    assert torch.equal(*results)
    for output in results:
        output.square().sum().backward()
    assert len(list(tied.parameters())) == len(list(rnn.parameters())) - 1
    close(tied.weight_y_z_l0.grad, rnn.weight_y_z_l0.grad + rnn.weight_z_m_l0.grad, "gradients")


def test_repr_device_and_dtype():
    rnn = fastlstm.RNN(gadget, 3, 5, 2, backend="reference", device="meta", dtype=torch.float16)
    assert repr(rnn) == "fastlstm.RNN(gadget, 3, 5, num_layers=2, backend=reference)"
    assert {(a.device.type, a.dtype) for a in rnn.parameters()} == {("meta", torch.float16)}
    with torch.device("meta"):
        assert fastlstm.RNN(gadget, 3, 5).p_l0.device.type == "meta"


@pytest.mark.parametrize("cell", [gadget, cells.peephole_lstm, cells.rhn(3), of_products], ids=lambda cell: cell.name)
def test_copies(cell):
    rnn = RNN(cell, 3, 6, 2, heads=3)
    x, states, inputs = given(rnn)
    expected = rnn(x, states, inputs)
    for copy in copies_of(rnn):
        assert type(copy) is fastlstm.RNN
        assert (copy.cell, copy.heads, repr(copy)) == (cell, 3, repr(rnn))
        assert all(a is not b for a, b in zip(copy.parameters(), rnn.parameters(), strict=True))
        close(copy(x, states, inputs), expected, "sums")
    old = RNN(cell, 3, 6, 2)
    expected_of_old, text = old(x, states, inputs), repr(old)
    del old.__dict__["heads"]  # as in a pickle of before there were heads
    assert repr(old) == text
    close(old(x, states, inputs), expected_of_old, "sums")
    name = f"{cell.__module__}\n".encode() + cell.name.encode()
    assert name in pickle.dumps(rnn, protocol=0)
    other = RNN(cell, 3, 6, 2, heads=3)
    other.load_state_dict(rnn.state_dict())
    close(other(x, states, inputs), expected, "sums")
    with pytest.raises(RuntimeError, match="size mismatch"):
        RNN(cell, 3, 6, 2).load_state_dict(rnn.state_dict())
