"""Kernels keep denormal numbers, or set them to zero where the caller's thread does."""

import pytest
import torch

import fastlstm
from tests.helpers.layers import CPU_BACKENDS

TINY = 1e-39  # float32 is denormal below 1.2e-38


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_denormal_states_follow_the_mode_of_the_thread(backend, kind, flushes):
    """Weights of zero halve c of an LSTM, h of a GRU, and their gradients."""
    layer = kind(3, 20, backend=backend)
    x, ones = torch.zeros(1, 1, 3), torch.full((1, 1, 20), TINY)
    state = torch.full((1, 1, 20), TINY, requires_grad=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    supported = torch.set_flush_denormal(flushes)  # of this thread, on which so small a layer runs
    try:
        _, states = layer(x, (torch.zeros(1, 1, 20), state) if kind is fastlstm.LSTM else state)
        last = states[1] if kind is fastlstm.LSTM else states
        (gradient,) = torch.autograd.grad(last, state, ones)
    finally:
        torch.set_flush_denormal(False)
    if not supported:
        pytest.skip("torch cannot set denormal numbers to zero on this processor")
    expected = torch.full((1, 1, 20), 0.0 if flushes else TINY / 2)
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-44)  # some steps of the smallest denormal number
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-44)
