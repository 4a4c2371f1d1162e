"""torch's default dtype and device are for the tensors that users make: layers run on the CPU whatever they are."""

from copy import deepcopy

import pytest
import torch

from tests.helpers.modules import flat
from tests.helpers.quantized import KERNELS, both_kinds, quantized, same_bits


@torch.no_grad()
@both_kinds
@pytest.mark.parametrize("weights", ["float", "int8"])
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_other_defaults_change_no_bit(kind, weights, backend):
    torch.manual_seed(0)
    module, x = kind(7, 37), torch.randn(5, 3, 7)  # sizes that no other test has, so that kernels are planned here
    module.backend = backend
    if weights == "int8":
        module = quantized(module, backend=backend)
    lengths = torch.tensor([5, 2, 4])
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = flat(deepcopy(module)(x, lengths=lengths))
    finally:
        torch.set_default_dtype(before)
    copy = deepcopy(module)
    with torch.device("meta"):
        on_meta = [flat(copy(x, lengths=lengths)) for _ in range(2)]  # the second call has packed weights
    want = flat(deepcopy(module)(x, lengths=lengths))
    for each in (found, *on_meta):
        assert same_bits(each, want)
