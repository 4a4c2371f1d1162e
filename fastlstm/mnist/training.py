"""The training loop and the figures of a run. The clock, the losses and the bar stay out of the LSTM's way."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fastlstm.mnist.data import CLASSES, Dataset, Split, batches
from fastlstm.mnist.model import RowLSTM


@dataclass(frozen=True)
class Recipe:
    """What a run is: the same recipe gives the same weights, batches and losses. The defaults are the tutorial's."""

    iterations: int = 800
    batch_size: int = 128
    hidden_size: int = 128
    lr: float = 1e-3
    seed: int = 0


@dataclass
class History:
    """One entry for each iteration done: loss and accuracy on its batch, before its step, and its time."""

    batch_size: int
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    interrupted: bool = False

    def figures(self) -> dict[str, Any]:
        """Iterations and times; None for a time where there was no iteration."""
        done, seconds = len(self.loss), sum(self.seconds)
        return {
            "iterations": done,
            "interrupted": self.interrupted,
            "seconds": seconds,
            "ms_per_iteration": 1000 * seconds / done if done else None,
            "ms_per_iteration_median": 1000 * statistics.median(self.seconds) if done else None,
            "images_per_second": self.batch_size * done / seconds if done else None,
        }


class Scores(NamedTuple):
    validation_accuracy: float
    test_accuracy: float
    test_accuracy_first_128: float
    predictions: Tensor  # (N,) int64 on the CPU, of the test images


class Run(NamedTuple):
    model: RowLSTM
    history: History
    scores: Scores


class _Recorder:
    """Losses, accuracies and times, kept on the device and fetched many at once, so that a GPU is not waited for."""

    def __init__(self, history: History, device: torch.device):
        self._history = history
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[Tensor, Tensor, Any]] = []
        self._last = self._mark()

    def add(self, loss: Tensor, accuracy: Tensor) -> None:
        self._pending.append((loss, accuracy, self._mark()))

    def fetch(self) -> int:
        """Move what was added to the history, and return how many iterations that is."""
        if not self._pending:
            return 0
        losses, accuracies, marks = zip(*self._pending, strict=True)
        fetched = torch.stack(losses).tolist(), torch.stack(accuracies).tolist()  # the GPU has now passed the marks
        seconds = [b - a if not self._cuda else a.elapsed_time(b) / 1000 for a, b in pairwise((self._last, *marks))]
        # All at once: Ctrl-C falls into the wait above.
        self._history.loss += fetched[0]
        self._history.accuracy += fetched[1]
        self._history.seconds += seconds
        self._last, self._pending = marks[-1], []
        return len(marks)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def run(
    lstm_classes: Mapping[str, Callable[[int, int], nn.RNNBase]],
    data: Dataset,
    recipe: Recipe,
    *,
    verbose: bool = False,
) -> dict[str, Run]:
    """Train and evaluate a `RowLSTM` of each class by name, all from the same weights on the same batches.

    After a run that Ctrl-C ended there is no next one.
    """
    models = {
        name: RowLSTM(
            data.train.images.shape[2],
            recipe.hidden_size,
            CLASSES,
            lstm_class=lstm_class,
            generator=torch.Generator().manual_seed(recipe.seed),
        ).to(data.train.images.device)
        for name, lstm_class in lstm_classes.items()
    }
    for model in models.values():
        warm_up(model, data.train, recipe.batch_size)
    runs: dict[str, Run] = {}
    for name, model in models.items():
        history = train(model, data.train, recipe, name=name, verbose=verbose)
        runs[name] = Run(model, history, evaluate(model, data))
        if history.interrupted:
            break
    return runs


def warm_up(model: nn.Module, split: Split, batch_size: int) -> None:
    """Three passes over one batch, weights unchanged, so that no compilation falls into a run's time."""
    for _ in range(3):
        cross_entropy(model(split.images[:batch_size]), split.labels[:batch_size]).backward()
    model.zero_grad()


def train(model: nn.Module, split: Split, recipe: Recipe, *, name: str = "", verbose: bool = False) -> History:
    """Train `model` with Adam on batches of `split`, which lies on the model's device; Ctrl-C ends the run early.

    Args:
        name: stands before the progress bar.
        verbose: also print loss and accuracy every 10 iterations, in the tutorial's words.
    """
    history = History(recipe.batch_size)
    order = batches(
        len(split.labels), recipe.batch_size, torch.Generator().manual_seed(recipe.seed), split.labels.device
    )
    optimizer = torch.optim.Adam(model.parameters(), recipe.lr, fused=True)  # a third of foreach's time on a CPU
    recorder = _Recorder(history, split.labels.device)
    refresh = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file is spared
    shown = time.perf_counter()

    def show() -> None:
        if new := recorder.fetch():
            bar.set_postfix_str(f"loss {history.loss[-1]:.4f}, accuracy {history.accuracy[-1]:.3f}", refresh=False)
            bar.update(new)

    model.train()
    with tqdm(total=recipe.iterations, desc=name, unit="it", mininterval=0, dynamic_ncols=True) as bar:
        try:
            for iteration in range(1, recipe.iterations + 1):
                indices = next(order)
                labels = split.labels[indices]
                logits = model(split.images[indices])
                loss = cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recorder.add(loss.detach(), (logits.argmax(1) == labels).float().mean())
                tell = verbose and iteration % 10 == 0
                if tell or time.perf_counter() - shown > refresh:
                    show()
                    shown = time.perf_counter()
                if tell:
                    bar.write(
                        f"Iter {iteration * recipe.batch_size}, Minibatch Loss= {history.loss[-1]:.6f}, "
                        f"Training Accuracy= {history.accuracy[-1]:.5f}"
                    )
        except KeyboardInterrupt:
            history.interrupted = True
        show()
    return history


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset) -> Scores:
    """Accuracies on the validation and the test images."""
    model.eval()
    validation = (_predict(model, data.validation.images) == data.validation.labels).float().mean().item()
    predictions = _predict(model, data.test.images)
    right = (predictions == data.test.labels).float()
    return Scores(validation, right.mean().item(), right[:128].mean().item(), predictions.cpu())


def compare(ours: History, theirs: History) -> dict[str, float | None]:
    """Largest differences of the two loss curves over the iterations both did, and how many times ours is faster."""
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


def _predict(model: nn.Module, images: Tensor, batch_size: int = 1000) -> Tensor:
    return torch.cat([model(batch).argmax(1) for batch in images.split(batch_size)])
