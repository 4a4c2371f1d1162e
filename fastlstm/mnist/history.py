"""What a run recorded, iteration by iteration."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class History:
    """Losses and accuracies of the iterations done, each on its batch and before its step."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)  # accuracies by iterations done, an epoch apart
    seconds: float = 0.0  # of training
    interrupted: bool = False
    trouble: str = ""  # what could not be written, which interrupts a run too

    def add(self, loss: float, accuracy: float, seconds: float) -> None:
        self.loss.append(loss)
        self.accuracy.append(accuracy)
        self.seconds += seconds

    def state_dict(self) -> dict[str, Any]:
        """Return the entries as float64 tensors: (2, iterations), (2, validations) and ()."""
        validation = [[*self.validation.keys()], [*self.validation.values()]]
        parts = {"curves": [self.loss, self.accuracy], "validation": validation, "seconds": self.seconds}
        return {name: torch.tensor(part, dtype=torch.float64) for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.accuracy = state["curves"].tolist()
        iterations, accuracies = state["validation"].tolist()
        self.validation = dict(zip(map(int, iterations), accuracies, strict=True))
        self.seconds = state["seconds"].item()


def compare(ours: History, theirs: History) -> dict[str, float | None]:
    """Return the largest differences of two loss curves, over what both did, and the ratio of theirs time to ours."""
    both = min(len(ours.loss), len(theirs.loss))
    if not both:
        return dict.fromkeys(("loss_difference", "loss_difference_first_100", "time_ratio"))
    differences = np.abs(np.subtract(ours.loss[:both], theirs.loss[:both]))
    return {
        "loss_difference": differences.max().item(),  # NaN where a loss is
        "loss_difference_first_100": differences[:100].max().item(),
        "time_ratio": theirs.seconds / len(theirs.loss) / (ours.seconds / len(ours.loss)),
    }
