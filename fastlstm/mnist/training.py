"""The training loop, and how well a model reads."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from fastlstm.files import is_full
from fastlstm.mnist import augment
from fastlstm.mnist.board import Board
from fastlstm.mnist.checkpoint import Keeper
from fastlstm.mnist.data import CLASSES, Dataset, Split
from fastlstm.mnist.history import History, Recorder
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.processes import ALONE, Processes
from fastlstm.mnist.recipe import Recipe, iterations
from fastlstm.mnist.state import State


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
    verbose: bool = False,
    keepers: Mapping[str, Keeper] | None = None,
    board: Board | None = None,
    processes: Processes = ALONE,
) -> dict[str, Run]:
    """Train and evaluate a `RowLSTM` of each class by name, all from the same weights on the same batches.

    After a run that ended early there is no next one. Processes other than the first train along and return nothing.

    Args:
        keepers: where each run is kept and taken up.
        board: is told the first run.
    """
    with _numbers_for(recipe):
        models = {name: build(lstm_class, data.train, recipe) for name, lstm_class in lstm_classes.items()}
        wrapped = {
            name: processes.wrap(torch.compile(model) if recipe.compile else model)  # type: ignore[arg-type]
            for name, model in models.items()
        }
        for model in wrapped.values():
            warm_up(model, data.train, recipe, processes)
        runs: dict[str, Run] = {}
        for name, model in models.items():
            history = train(
                model,
                data.train,
                recipe,
                name=name,
                verbose=verbose,
                validation=data.validation,
                wrapped=wrapped[name],
                keeper=keepers[name] if keepers else None,
                board=board,
                processes=processes,
            )
            board = None
            if processes.rank == 0:
                runs[name] = Run(model, history, evaluate(model, data, recipe.precision))
            if history.interrupted:
                break
        return runs


def build(lstm_class: Callable[..., nn.RNNBase], split: Split, recipe: Recipe) -> RowLSTM:
    """Return the model of `recipe` for the images of `split`, on their device."""
    rows, columns = split.images.shape[1:]
    return RowLSTM(
        columns if recipe.steps is None else rows * columns // recipe.steps,
        recipe.hidden_size,
        CLASSES,
        num_layers=recipe.layers,
        bidirectional=recipe.bidirectional,
        proj_size=recipe.proj_size,
        dropout=recipe.dropout,
        permuted=rows * columns if recipe.permuted else 0,
        lstm_class=lstm_class,
        generator=torch.Generator().manual_seed(recipe.seed),
    ).to(split.images.device)


def warm_up(model: nn.Module, split: Split, recipe: Recipe, processes: Processes = ALONE) -> None:
    """Run three passes over one batch without changing weights, so that no compilation falls into a run's time."""
    images, labels = (processes.share(part[: recipe.batch_size]) for part in split)
    for _ in range(3):
        cross_entropy(_logits(model, images, recipe.precision), labels).backward()
    model.zero_grad()


def train(
    model: RowLSTM,
    split: Split,
    recipe: Recipe,
    *,
    name: str = "",
    verbose: bool = False,
    validation: Split | None = None,
    wrapped: nn.Module | None = None,
    keeper: Keeper | None = None,
    board: Board | None = None,
    processes: Processes = ALONE,
) -> History:
    """Train `model` by `recipe` on batches of `split`, which lies on the model's device.

    Ctrl-C ends the run early, and so does a checkpoint, a log or a line that cannot be written: the history says it.

    Args:
        name: stands before the progress bar.
        verbose: also print loss and accuracy every 10 iterations, in the tutorial's words.
        validation: what the accuracy is taken of after each epoch, outside the clock.
        wrapped: what runs in the place of `model`: itself, compiled or made parallel.
        keeper: keeps the state as it goes; a run taken up continues bit for bit.
        board: is told what the progress bar is told.
        processes: each trains on its share of every batch.

    Raises:
        CheckpointError: when what `keeper` is to take up is damaged or of another run.
    """
    device, first = split.labels.device, processes.rank == 0
    wrapped = model if wrapped is None else wrapped
    state = State(model, recipe, len(split.labels), device)
    if keeper is not None:
        keeper.take_up(state)
    history, done = state.history, len(state.history.loss)
    if board is not None:
        board.start(done)
    epoch = iterations(1, len(split.labels), recipe.batch_size)
    recorder = Recorder(history, device)
    refresh = 0.2 if sys.stderr.isatty() else 10.0  # seconds; a log file is spared
    shown = time.perf_counter()

    def show() -> None:
        nonlocal shown
        if new := recorder.fetch():
            bar.set_postfix_str(f"loss {history.loss[-1]:.4f}, accuracy {history.accuracy[-1]:.3f}", refresh=False)
            bar.update(new)
            if board is not None:
                board.tell(history, new)
        shown = time.perf_counter()

    wrapped.train()
    bar_options = {"mininterval": 0, "dynamic_ncols": True, "disable": not first}
    try:
        if keeper is not None and first:
            keeper.keep(state)
        with _Bar(total=recipe.iterations, initial=done, desc=name, unit="it", **bar_options) as bar:
            try:
                for iteration in range(done + 1, recipe.iterations + 1):
                    recorder.add(_iterate(state, wrapped, split, recipe, processes))
                    tell = verbose and first and iteration % 10 == 0
                    if tell or time.perf_counter() - shown > refresh:
                        show()
                    if tell:
                        bar.write(
                            f"Iter {iteration * recipe.batch_size}, Minibatch Loss= {history.loss[-1]:.6f}, "
                            f"Training Accuracy= {history.accuracy[-1]:.5f}"
                        )
                    if not first:
                        continue
                    ended = iteration == recipe.iterations
                    if validation is not None and (ended or iteration % epoch == 0):
                        show()
                        accuracy = _accuracy(state.tested, validation, recipe.precision)
                        history.validation.append((iteration, accuracy))
                        if board is not None:
                            board.tell_validation(iteration, accuracy)
                        recorder.restart()
                    if keeper is not None and (ended or iteration % keeper.every == 0):
                        show()
                        keeper.keep(state)
                        recorder.restart()
            except KeyboardInterrupt:
                history.interrupted = True
            show()
    except OSError as error:
        if not is_full(error):
            raise
        history.interrupted, history.trouble = True, str(error)
    if state.average is not None:
        model.load_state_dict(state.average.module.state_dict())
    return history


class _Bar(tqdm):
    """A progress bar that no run depends on: what a full disk or a closed pipe does not take is not shown."""

    def display(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            super().display(*args, **kwargs)

    def clear(self, *args: Any, **kwargs: Any) -> None:
        with suppress(OSError):
            super().clear(*args, **kwargs)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def _iterate(state: State, model: nn.Module, split: Split, recipe: Recipe, processes: Processes) -> Tensor:
    """Run one iteration, and return the batch's loss and accuracy before it, (2,)."""
    indices = processes.share(next(state.batches))
    images, labels = split.images[indices], split.labels[indices]
    if "augmentation" in recipe.parts:
        images = augment.move(images, processes.share(augment.draw(recipe.batch_size, state.chances)))
    if recipe.dropout:  # the global generator is nobody's: what it draws here is this iteration's and this process's
        seeds = torch.randint(2**62, (processes.number,), generator=state.chances)
        torch.manual_seed(int(seeds[processes.rank]))
    logits = _logits(model, images, recipe.precision)
    loss = cross_entropy(logits, labels)
    state.optimizer.zero_grad()
    loss.backward()
    state.step()
    return processes.mean(torch.stack((loss.detach(), (logits.argmax(1) == labels).float().mean())))


@contextmanager
def _numbers_for(recipe: Recipe) -> Iterator[None]:
    """Count denormal numbers as zero in training on long sequences. Gradients vanish into such numbers, and a CPU is
    forty times slower on them.

    torch's threads inherit the setting when they start, which is when the first batch is run.
    """
    torch.set_flush_denormal(recipe.steps is not None)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _logits(model: nn.Module, images: Tensor, precision: str) -> Tensor:
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
    try:
        return torch.cat([_logits(model, batch, precision) for batch in images.split(batch_size)])
    finally:
        model.train(training)


def _accuracy(model: RowLSTM, split: Split, precision: str) -> float:
    return (predict(model, split.images, precision).argmax(1) == split.labels).float().mean().item()
