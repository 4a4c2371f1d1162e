"""`torch.jit.trace`: what it records runs and trains, at other sizes too."""

import io

import pytest
import torch
from torch.func import grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from fastlstm import torch_private
from fastlstm.backends import reference
from tests.helpers.layers import needs_native
from tests.helpers.tolerances import close


def traced_again(module, x):
    """Traced, with torch's own check of a second trace without gradients, saved and loaded."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (x,)), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are checked, and traced as they are
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore:LSTM with projections")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"proj_size": 2},
        {"backend": "reference"},
        pytest.param({"backend": "native"}, marks=needs_native),
    ],
)
def test_a_trace_runs_and_trains(options):
    lstm, x = fastlstm.LSTM(4, 6, **options), torch.randn(5, 3, 4)
    traced, other = traced_again(lstm, x), torch.randn(7, 2, 4)
    with torch.no_grad():
        assert torch.equal(traced(other)[0], lstm(other)[0])
    for module in (traced, lstm):
        module(other)[0].square().sum().backward()
    for name, parameter in traced.named_parameters():
        torch.testing.assert_close(parameter.grad, lstm.get_parameter(name).grad, rtol=1e-5, atol=1e-6)


class Packing(torch.nn.Module):
    def __init__(self, lstm, is_sorted):
        super().__init__()
        self.lstm, self.is_sorted = lstm, is_sorted

    def forward(self, x, lengths):
        output, states = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=self.is_sorted))
        return pad_packed_sequence(output)[0], *states


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize("traced", [[2, 2], [5, 3, 2], [3, 3, 3]])
def test_a_trace_takes_packed_batches_of_other_lengths(traced, is_sorted, options):
    """Of as many rows in all, too, which another batch size would take for its own."""
    lstm = fastlstm.LSTM(4, 6, **options)
    want, example = Packing(lstm, is_sorted), (torch.randn(max(traced), len(traced), 4), torch.tensor(traced))
    got = torch.jit.trace(want, example, check_trace=False)
    for lengths in ([2, 1, 1], [4, 4, 4, 4], [1], [7, 5, 5, 3, 1]):
        lengths = lengths if is_sorted else lengths[::-1]
        batch = torch.randn(max(lengths), len(lengths), 4), torch.tensor(lengths)
        close(got(*batch), want(*batch), "values")


class LastState(Packing):
    def forward(self, x, lengths):
        return super().forward(x, lengths)[1]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
def test_a_trace_of_packed_input_without_a_mask():
    """Where all are equally long it serves others of that kind."""
    h_n = LastState(fastlstm.LSTM(4, 6, backend="aten"), True)
    traced = torch.jit.trace(h_n, (torch.randn(2, 2, 4), torch.tensor([2, 2])), check_trace=False)
    for T in (2, 3, 5):
        batch = torch.randn(T, 2, 4), torch.tensor([T, T])
        close(traced(*batch), h_n(*batch), "values")


@pytest.mark.skipif(
    torch_private.PUBLIC, reason="by public names alone an operator's parts see no transform, and torch raises"
)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
def test_a_trace_of_frozen_weights_and_of_a_cell():
    x = torch.randn(5, 3, 4)
    for module in (fastlstm.LSTM(4, 6).requires_grad_(False), fastlstm.LSTMCell(4, 6)):
        given = x[0] if isinstance(module, fastlstm.LSTMCell) else x
        traced = traced_again(module, given)
        torch.testing.assert_close(traced(given)[0], module(given)[0], rtol=1e-6, atol=1e-6)  # a rounding of each sum
        many = torch.stack((given, given.cos()))
        got, want = (vmap(grad(lambda a, m=m: m(a)[0].sin().sum()))(many) for m in (traced, module))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.* is deprecated")
def test_a_trace_saves_no_gates_where_nobody_differentiates(monkeypatch):
    lstm, x, saves = fastlstm.LSTM(4, 6, backend="reference"), torch.randn(5, 3, 4), []
    traced, forward = torch.jit.trace(lstm, (x,)), reference.forward

    def watched(layer, save):
        saves.append(save)
        return forward(layer, save)

    monkeypatch.setattr(reference, "forward", watched)
    with torch.no_grad():
        traced(x)
    traced(x)
    assert saves == [False, True]
