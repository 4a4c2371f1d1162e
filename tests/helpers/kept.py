"""What the tests of weights that stay packed share."""

import torch

from tests.helpers.modules import flat


def both(module, x, hx=None):
    """What the module gives without gradients, and with: the second packs its weights at every call."""
    with torch.no_grad():
        packed = module(x, hx)
    return packed, module(x, hx)


def assert_same_bits(module, x, hx=None):
    for got, want in zip(*map(flat, both(module, x, hx)), strict=True):
        assert torch.equal(got, want.detach())
