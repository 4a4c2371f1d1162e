"""The training loop, and how well a model reads."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastlstm.mnist.data import CLASSES, Dataset, Split, draw_maps, moved, shuffled_batches
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.recipe import Recipe, iterations
from fastlstm.mnist.state import Checkpoint, History, State


class Scores(NamedTuple):
    validation_accuracy: float
    test_accuracy: float
    test_accuracy_first_128: float
    probabilities: Tensor  # (N, classes) on the CPU, of the test images

    @property
    def predictions(self) -> Tensor:
        return self.probabilities.argmax(1)


class Run(NamedTuple):
    model: RowLSTM
    history: History
    scores: Scores


def run(
    lstm_classes: Mapping[str, Callable[..., nn.RNNBase]],
    data: Dataset,
    recipe: Recipe,
    *,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Run]:
    """Train and evaluate a `RowLSTM` of each class by name, all from the same weights on the same batches, until one
    ends early. They go on from the states that the `checkpoint` of this recipe keeps, and are kept in it.
    """
    # Over many steps gradients vanish into denormal numbers, with which a CPU is forty times slower. Torch's threads
    # inherit the setting when they start, which is when the first batch is run.
    torch.set_flush_denormal(recipe.steps > 0)
    states = {name: State(build(each, data.train, recipe), recipe) for name, each in lstm_classes.items()}
    wrapped: dict[str, nn.Module] = {}
    for name, state in states.items():
        if checkpoint is not None:
            checkpoint.take_up(name, state)
        wrapped[name] = torch.compile(state.model) if recipe.compile else state.model  # type: ignore[assignment]
        _warm_up(wrapped[name], data.train, recipe)
    runs: dict[str, Run] = {}
    for name, state in states.items():
        train(state, data.train, data.validation, name, wrapped[name], checkpoint)
        runs[name] = Run(state.tested, state.history, evaluate(state.tested, data, recipe.precision))
        if state.history.interrupted:
            break
    torch.set_flush_denormal(False)
    return runs


def build(lstm_class: Callable[..., nn.RNNBase], split: Split, recipe: Recipe) -> RowLSTM:
    """Return the model of `recipe` for the images of `split`, on their device."""
    rows, columns = split.images.shape[1:]
    return RowLSTM(
        rows * columns // (recipe.steps or rows),
        recipe.hidden_size,
        CLASSES,
        num_layers=recipe.layers,
        bidirectional=recipe.bidirectional,
        dropout=recipe.dropout,
        lstm_class=lstm_class,
        generator=torch.Generator().manual_seed(recipe.seed),
    ).to(split.images.device)


def train(
    state: State,
    split: Split,
    validation: Split | None = None,
    name: str = "",
    wrapped: nn.Module | None = None,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train `state.model` by its recipe on batches of `split`, which lies on the model's device. Ctrl-C ends the run
    early: the history says it. The clock leaves out the accuracy on `validation` after each epoch. `name` is the
    model's; `wrapped`, itself or compiled, runs.
    """
    recipe, history = state.recipe, state.history
    model = (state.model if wrapped is None else wrapped).train()
    epoch = iterations(1, len(split.labels), recipe.batch_size)
    try:
        with _progress(name, state.done, recipe.iterations) as bar:
            start = time.perf_counter()
            for draw in islice(_draws(recipe, split), state.done, recipe.iterations):
                loss, accuracy = _iterate(state, model, split, draw).tolist()  # waits for a GPU
                history.seconds += time.perf_counter() - start
                history.loss.append(loss)
                history.accuracy.append(accuracy)
                if bar is not None:
                    bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.3f}", refresh=False)
                    bar.update()
                has_ended = state.done == recipe.iterations
                if validation is not None and (has_ended or state.done % epoch == 0):
                    history.validation[state.done] = _accuracy(state.tested, validation, recipe.precision)
                if checkpoint is not None and (has_ended or state.done % checkpoint.every == 0):
                    checkpoint.keep(name, state)
                start = time.perf_counter()
    except KeyboardInterrupt:
        history.interrupted = True


def _progress(name: str, done: int, iterations: int) -> Any:
    """Return the context of a progress bar, which is None without the package tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    interval = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file is spared
    options = {"mininterval": interval, "dynamic_ncols": True}
    return tqdm(total=iterations, initial=done, desc=name, unit="it", **options)


def _warm_up(model: nn.Module, split: Split, recipe: Recipe) -> None:
    """Run three passes over one batch without changing weights, so that no compilation falls into a run's time."""
    images, labels = (part[: recipe.batch_size] for part in split)
    for _ in range(3):
        cross_entropy(_logits(model, images, recipe.precision), labels).backward()
    model.zero_grad()


def _draws(recipe: Recipe, split: Split) -> Iterator[tuple[Tensor, Tensor | None, int]]:
    """Yield for each iteration the images' indices (B,), maps (B, 2, 3) or None, and the seed of dropout."""
    generator = torch.Generator().manual_seed(recipe.seed)
    chances = torch.Generator().manual_seed(recipe.seed ^ 0x5EED)
    for indices in shuffled_batches(len(split.labels), recipe.batch_size, generator, split.labels.device):
        maps = draw_maps(recipe.batch_size, chances) if "augmentation" in recipe.parts else None
        yield indices, maps, int(torch.randint(2**62, (), generator=chances)) if recipe.dropout else 0


def _iterate(state: State, model: nn.Module, split: Split, draw: Any) -> Tensor:
    """Run one iteration, on one of `_draws`, and return the batch's loss and accuracy before it, (2,)."""
    indices, maps, seed = draw
    images, labels = (part[indices] for part in split)
    if maps is not None:
        images = moved(images, maps)
    if state.recipe.dropout:  # the global generator is nobody's: what it draws here is this iteration's
        torch.manual_seed(seed)
    logits = _logits(model, images, state.recipe.precision)
    loss = cross_entropy(logits, labels)
    state.optimizer.zero_grad()
    loss.backward()
    state.step()
    return torch.stack((loss.detach(), (logits.argmax(1) == labels).float().mean()))


def _logits(model: nn.Module, images: Tensor, precision: str = "fp32") -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(images).float()


def evaluate(model: RowLSTM, data: Dataset, precision: str = "fp32") -> Scores:
    """Return accuracies on the validation and the test images."""
    validation = _accuracy(model, data.validation, precision)
    probabilities = predict(model, data.test.images, precision).softmax(1)
    right = (probabilities.argmax(1) == data.test.labels).float()
    return Scores(validation, right.mean().item(), right[:128].mean().item(), probabilities.cpu())


@torch.no_grad()
def predict(model: RowLSTM, images: Tensor, precision: str = "fp32") -> Tensor:
    """Return the logits (N, classes) of `images` (N, rows, columns); the model is left as it was."""
    training = model.training
    model.eval()
    steps = images[0].numel() // model.lstm.input_size
    batch_size = max(100, 28_000 // steps)  # the states of all steps lie in memory
    logits = torch.cat([_logits(model, batch, precision) for batch in images.split(batch_size)])
    model.train(training)
    return logits


def _accuracy(model: RowLSTM, split: Split, precision: str) -> float:
    return (predict(model, split.images, precision).argmax(1) == split.labels).float().mean().item()
