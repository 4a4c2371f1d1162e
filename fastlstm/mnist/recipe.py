"""What a run is: sizes, length and the named recipes. The techniques that a recipe adds are `PARTS`."""

import math
from dataclasses import dataclass
from typing import Any

import torch

# What a recipe may add to plain Adam; docs/training.md shows what each one brings.
PARTS = {
    "augmentation": "each image is shifted, turned and scaled a little, anew each time",
    "average": "the weights tested are an exponential moving average over the last thousand iterations",
    "schedule": "the step size rises over the first tenth and then falls to zero as a cosine",
}
RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "best": {"epochs": 15, "lr": 4e-3, "parts": ("augmentation", "average")},
}
AVERAGE_DECAY = 0.999


@dataclass(frozen=True)
class Recipe:
    """The same recipe gives the same weights, batches and losses. The defaults are the tutorial's."""

    iterations: int = 800
    batch_size: int = 128  # over all processes
    hidden_size: int = 128
    lr: float = 1e-3  # the largest, where the schedule moves it
    seed: int = 0
    parts: tuple[str, ...] = ()  # of PARTS
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    dropout: float = 0.0  # between the layers and on the last state
    steps: int | None = None  # an image's pixels are read in this many steps; None: its rows
    permuted: bool = False  # the pixels in one fixed random order
    precision: str = "fp32"  # or bf16: autocast
    compile: bool = False

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.lr, fused=True)  # a third of foreach's time on a CPU

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Return a scheduler that multiplies `lr`, or None for a constant `lr`. The factor rises linearly in the first
        tenth of the iterations, and then falls to zero as half a cosine.
        """
        if "schedule" not in self.parts:
            return None
        rise = max(1, self.iterations // 10)
        fall = max(1, self.iterations - rise)

        def factor(done: int) -> float:
            return (done + 1) / rise if done < rise else (1 + math.cos(math.pi * (done - rise) / fall)) / 2

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def iterations(epochs: int, images: int, batch_size: int) -> int:
    """Return the iterations that `epochs` passes over `images` take, rounded."""
    return max(1, round(epochs * images / batch_size))
