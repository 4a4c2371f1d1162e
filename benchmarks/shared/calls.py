"""What is timed: a call without gradients, and a training step without an optimizer. Both are checked first."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor


def inference(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return `call` without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def training(
    call: Callable[[], Tensor], leaves: Iterable[Tensor], gradient: Tensor | None = None
) -> Callable[[], list[Tensor]]:
    """Return `call` and the backward pass from its output to the leaves.

    Gradients are fresh ones, as after `zero_grad`. `gradient` is the output's; without one it is of ones. What is
    returned gives the output, then the leaves' gradients.
    """
    leaves = list(leaves)

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        output = call()
        output.backward(torch.ones_like(output) if gradient is None else gradient)
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def called(
    mode: str, call: Callable[[], Tensor], leaves: Iterable[Tensor], gradient: Tensor | None = None
) -> Callable[[], Any]:
    """Return what a mode of `shapes.MODES` runs."""
    return inference(call) if mode == "inference" else training(call, leaves, gradient)


def check(result: Any, expected: Any, tolerance: float) -> None:
    """Raise unless each tensor is the expected one within `tolerance`, times its largest value if that is above 1."""
    for a, b in zip(*map(pytree.tree_leaves, (result, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1.0, b.abs().max().item()))
