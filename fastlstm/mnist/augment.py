"""Small random movements of images, so that no epoch shows the same ones again."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

SHIFT = 2.0  # pixels of a 28-pixel image
TURN = math.radians(10)
SCALE = 0.1


def draw(batch_size: int, generator: torch.Generator) -> Tensor:
    """Return affine maps (batch_size, 2, 3) from the moved image's coordinates to the original's, in [-1, 1].

    Shift, turn and scale are each uniform between their bounds. The maps depend on the CPU `generator` alone.
    """
    turn, wide, high, right, down = (2 * torch.rand(5, batch_size, generator=generator) - 1).unbind()
    cos, sin = (TURN * turn).cos(), (TURN * turn).sin()
    wide, high = 1 + SCALE * wide, 1 + SCALE * high
    shift = SHIFT * 2 / 28
    return torch.stack((cos * wide, -sin * wide, shift * right, sin * high, cos * high, shift * down), 1).view(-1, 2, 3)


def move(images: Tensor, maps: Tensor) -> Tensor:
    """Return `images` (B, rows, columns) moved by the affine `maps` (B, 2, 3): bilinear, and zero outside."""
    pictures = images.unsqueeze(1)
    grid = affine_grid(maps.to(images.device), list(pictures.shape), align_corners=False)
    return grid_sample(pictures, grid, align_corners=False).squeeze(1)
