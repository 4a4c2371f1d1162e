"""What a run recorded, iteration by iteration. The clock and the losses stay out of the LSTM's way."""

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class History:
    """One entry for each iteration done: loss and accuracy on its batch, before its step, and its time."""

    batch_size: int
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)  # iterations done, accuracy; an epoch apart
    interrupted: bool = False
    trouble: str = ""  # what could not be written, which interrupts a run too

    def figures(self) -> dict[str, Any]:
        """Return iterations and times; None for a time where there was no iteration."""
        done, seconds = len(self.loss), sum(self.seconds)
        return {
            "iterations": done,
            "interrupted": self.interrupted,
            "seconds": seconds,
            "ms_per_iteration": 1000 * seconds / done if done else None,
            "ms_per_iteration_median": 1000 * statistics.median(self.seconds) if done else None,
            "images_per_second": self.batch_size * done / seconds if done else None,
        }

    def reached(self, accuracy: float) -> dict[str, Any] | None:
        """Return how many iterations and seconds of training it took to reach this validation accuracy, or None."""
        for iterations, reached in self.validation:
            if reached >= accuracy:
                return {"iterations": iterations, "seconds": sum(self.seconds[:iterations])}
        return None

    def state_dict(self) -> dict[str, Any]:
        curves = torch.tensor([self.loss, self.accuracy, self.seconds], dtype=torch.float64)
        return {"curves": curves, "validation": list(self.validation)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss, self.accuracy, self.seconds = state["curves"].tolist()
        self.validation = list(state["validation"])


class Recorder:
    """Losses, accuracies and times, kept on the device and fetched many at once, so that a GPU is not waited for."""

    def __init__(self, history: History, device: torch.device):
        self._history = history
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[Tensor, Any, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Start the clock anew: what happened since the last iteration is not the next one's time."""
        self._last = self._mark()

    def add(self, loss_and_accuracy: Tensor) -> None:
        mark = self._mark()
        self._pending.append((loss_and_accuracy, self._last, mark))
        self._last = mark

    def fetch(self) -> int:
        """Move what was added to the history, and return how many iterations that is."""
        if not self._pending:
            return 0
        values, starts, ends = zip(*self._pending, strict=True)
        losses, accuracies = torch.stack(values, 1).tolist()  # the GPU has now passed the marks
        seconds = [b - a if not self._cuda else a.elapsed_time(b) / 1000 for a, b in zip(starts, ends, strict=True)]
        # All at once: Ctrl-C falls into the wait above.
        self._history.loss += losses
        self._history.accuracy += accuracies
        self._history.seconds += seconds
        self._pending = []
        return len(seconds)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def compare(ours: History, theirs: History) -> dict[str, float | None]:
    """Return the largest difference of the two loss curves over the iterations that both did, and how many times faster
    ours is.
    """
    both = min(len(ours.loss), len(theirs.loss))
    a, b = ours.figures(), theirs.figures()
    if not both:
        return dict.fromkeys(("loss_difference", "loss_difference_first_100", "time_ratio", "time_ratio_mean"))
    differences = np.abs(np.subtract(ours.loss[:both], theirs.loss[:both]))
    return {
        "loss_difference": differences.max().item(),  # NaN where a loss is
        "loss_difference_first_100": differences[:100].max().item(),
        "time_ratio": b["ms_per_iteration_median"] / a["ms_per_iteration_median"],
        "time_ratio_mean": b["ms_per_iteration"] / a["ms_per_iteration"],
    }
