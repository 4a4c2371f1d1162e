"""The sizes and the length of a run, and the named recipes."""

from dataclasses import dataclass
from typing import Any

PARTS = "augmentation", "average"  # what a recipe may add to plain Adam; docs/training.md shows what each one brings
RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "best": {"epochs": 15, "lr": 4e-3, "parts": ("augmentation", "average")},
}


@dataclass(frozen=True)
class Recipe:
    """The same recipe gives the same weights, batches and losses. The defaults are the tutorial's."""

    iterations: int = 800
    batch_size: int = 128
    hidden_size: int = 128
    lr: float = 1e-3
    seed: int = 0
    parts: tuple[str, ...] = ()  # of PARTS
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0  # between the layers and on the last state
    steps: int = 0  # an image's pixels are read in this many steps; 0: its rows
    precision: str = "fp32"  # or bf16: autocast
    compile: bool = False


def iterations(epochs: int, images: int, batch_size: int) -> int:
    """Return the iterations that `epochs` passes over `images` take, rounded."""
    return max(1, round(epochs * images / batch_size))
