"""All layers and directions of a module in one call: weights of two types, frozen layers, and second derivatives."""

import pytest
import torch

import fastlstm
from tests.helpers.modules import pair
from tests.helpers.tolerances import close


def test_a_later_weight_of_another_dtype_is_no_old_plan_s():
    """A module that was called before raises, as a new one does."""
    module, x = fastlstm.LSTM(3, 5, 2), torch.randn(4, 2, 3)
    module(x)
    module.weight_hh_l1.data = module.weight_hh_l1.data.double()
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        module(x)


def test_frozen_layers_run_no_backward_pass(calls):
    """As in fine-tuning the top of a model: what nobody wants is neither computed nor kept."""
    module, x = fastlstm.LSTM(4, 6, 3, backend="numba"), torch.randn(5, 2, 4)
    for name, weight in module.named_parameters():
        weight.requires_grad_(name.endswith("l2"))
    module(x)[0].sum().backward()
    assert calls.count("backward") == 1
    assert [name for name, weight in module.named_parameters() if weight.grad is not None] == [
        name for name, _ in module.named_parameters() if name.endswith("l2")
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_second_derivatives_under_hooks_of_saved_tensors(layers):
    theirs, ours = pair(3, 5, layers)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (theirs, ours):
        with torch.autograd.graph.save_on_cpu():
            (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
            results.append(torch.autograd.grad((gradient**2).sum(), [x, *module.parameters()], allow_unused=True))
    close(results[1], results[0], "derivatives")
