"""The sizes that are measured, and the arithmetic that each of them needs."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

GATES = {"LSTM": 4, "GRU": 3}
MODES = ("inference", "training")


@dataclass(frozen=True)
class Shape:
    """T time steps, B batch rows, I inputs, H hidden units, of which a projection gives P."""

    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    cell: str = "LSTM"
    P: int = 0

    def __str__(self) -> str:
        name = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        name += (f"-L{self.layers}" if self.layers > 1 else "") + ("-bi" if self.bidirectional else "")
        name += f"-P{self.P}" if self.P else ""
        return name if self.cell == "LSTM" else f"{self.cell}-{name}"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def module(self, package: Any, **options: Any) -> Any:
        """Return the layer of torch.nn, or of another package with such a layer."""
        options |= {"proj_size": self.P} if self.P else {}
        cls = getattr(package, self.cell)
        return cls(self.I, self.H, self.layers, bidirectional=self.bidirectional, **options)

    def flops(self, mode: str) -> int:
        """A multiply-add counts as two. `mode` is "inference" or "training"; x needs no gradient, inner layers do."""
        total = 0
        for layer in range(self.layers):
            I, H = (self.I if layer == 0 else self.directions * self.H), self.H
            terms = I + H  # preact
            if mode == "training":
                terms += I + H + H  # dweight_ih, dweight_hh, dh
                terms += I if layer else 0  # dx
            total += self.directions * 2 * self.T * self.B * GATES[self.cell] * H * terms
        return total


SOME = (
    Shape(28, 128, 28, 128),  # the row-LSTM
    Shape(512, 16, 64, 64),
    Shape(128, 64, 256, 256),
    Shape(35, 8, 650, 650),
    Shape(28, 1, 28, 128),
    Shape(1, 1, 128, 512),
    Shape(50, 32, 80, 256, layers=2, bidirectional=True),
)
GRID = (
    *SOME,
    Shape(28, 128, 28, 256),
    Shape(20, 256, 100, 100),
    Shape(100, 32, 128, 512),
    Shape(784, 128, 1, 128),  # MNIST by pixel
)
PROJECTED = (Shape(50, 1, 40, 256, P=64), Shape(50, 32, 80, 256, P=128), Shape(28, 128, 28, 512, P=128))


def random_shapes(count: int, seed: int, limit: float = 8e9) -> Iterator[Shape]:
    """`count` shapes, each size drawn evenly in its logarithm, a training step of at most `limit` operations."""
    draw = random.Random(seed)

    def size(largest: int) -> int:
        return round(largest ** draw.random())

    while count:
        shape = Shape(size(512), size(256), size(512), size(768), draw.choice((1, 1, 2)), draw.random() < 0.25)
        if shape.flops("training") <= limit:
            yield shape
            count -= 1
