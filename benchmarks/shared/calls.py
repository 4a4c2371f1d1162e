"""What is timed: a call without gradients, a training step, and one with its optimizer. Results are compared first."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

OURS = "fastlstm"


def inference(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return `call` without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def training(
    call: Callable[[], Tensor],
    leaves: Iterable[Tensor],
    gradient: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], list[Tensor]]:
    """Return `call` and the backward pass from its output to the leaves, and a step of the optimizer if there is one.

    Gradients are fresh ones, as after `zero_grad`. `gradient` is the output's; without one it is of ones. What is
    returned gives the output, then the leaves' gradients.
    """
    leaves = list(leaves)

    def run() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        output = call()
        output.backward(torch.ones_like(output) if gradient is None else gradient)
        if optimizer is not None:
            optimizer.step()
        return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    return run


def called(
    mode: str, call: Callable[[], Tensor], leaves: Iterable[Tensor], gradient: Tensor | None = None
) -> Callable[[], Any]:
    """Return what a mode of `shapes.MODES` runs."""
    return inference(call) if mode == "inference" else training(call, leaves, gradient)


def of_model(
    mode: str, model: nn.Module, call: Callable[[nn.Module], Any], with_adam: bool = True
) -> Callable[[], Any]:
    """Return what a mode runs of a model whose call gives a tensor or several. Their mean squares are its loss."""

    def loss() -> Tensor:
        outputs = [a for a in pytree.tree_leaves(call(model)) if a.is_floating_point() and a.requires_grad]
        return torch.stack([output.square().mean() for output in outputs]).sum()

    if mode == "inference":
        return inference(lambda: call(model))
    optimizer = torch.optim.Adam(model.parameters(), 1e-5) if with_adam else None
    step = training(loss, model.parameters(), optimizer=optimizer)
    return lambda: step()[0]


def check(result: Any, expected: Any, tolerance: float) -> None:
    """Raise unless each tensor is the expected one within `tolerance`, times its largest value if that is above 1."""
    leaves = ([torch.as_tensor(a) for a in pytree.tree_leaves(each) if a is not None] for each in (result, expected))
    for a, b in zip(*leaves, strict=True):
        atol = tolerance * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)
