"""What shows that a library's model computes the same with its integration."""

import copy
from typing import Any

import pytest
import torch

from tests.helpers.tolerances import close
from tests.helpers.training import losses_of


def library(module: str, package: str = "", extra: str = "integrations") -> Any:
    """A module of a library. Where the library is not installed, the test is skipped."""
    return pytest.importorskip(module, reason=f"needs the package {package or module}: pip install .[{extra}]")


def gradients(values, wanted):
    """The gradients of a loss in which each number of `values` has a weight of its own."""
    torch.manual_seed(2)
    return torch.autograd.grad(values, wanted, [torch.randn(a.shape, dtype=a.dtype) for a in values])


def check(integration, theirs, results, kinds=("values", "gradients"), refused=(), ours=None):
    """A model computes the same with an integration, in a copy or in `ours`. `results` returns what a model computes, a
    group for each of `kinds`. The method `forward` of a class in `refused` must not run. Returns the accelerated model.
    """
    ours, expected = ours or integration.accelerate(copy.deepcopy(theirs)), results(theirs)
    with pytest.MonkeyPatch.context() as patch:
        for cls in refused:
            patch.setattr(cls, "forward", None)  # which would be called
        got = results(ours)
    for a, b, kind in zip(got, expected, kinds, strict=True):
        close(a, b, kind)
    return ours


def check_their_code(integration, model, call, monkeypatch):
    """A call of a model runs the library's own code with an integration, too."""
    expected = call(model)
    integration.accelerate(model)
    monkeypatch.setattr(integration, "run_cell", None)  # which would be called
    got = call(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def check_stays(integration, module, reason):
    """`accelerate` warns of a module, and leaves it as it is."""
    theirs = type(module)
    with pytest.warns(UserWarning, match=rf"^{theirs.__name__} stays as it is: {reason}"):
        integration.accelerate(torch.nn.Sequential(module))
    assert type(module) is theirs


def check_training(theirs, ours, loss_of, rate, steps):
    """Two models learn alike, and do learn."""
    curves = [losses_of(model, loss_of, rate, steps) for model in (theirs, ours)]
    close(curves[1], curves[0], "models")
    assert curves[1][-1] < 0.95 * curves[1][0]
