"""A short training, whose losses tell whether two models learn alike."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def losses_of(model: nn.Module, loss_of: Callable[[nn.Module], Tensor], rate: float, steps: int) -> Tensor:
    """The losses (steps,) of a model before each step of Adam at a learning rate."""
    optimizer, losses = torch.optim.Adam(model.parameters(), rate), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
