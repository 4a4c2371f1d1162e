"""What a run says at its end and leaves behind: metrics.json, model.pt, training.png."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fastlstm.mnist.data import Split
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.training import Recipe, Run, compare

ROWS, COLUMNS = 4, 12  # of the grid of mistakes
COLOURS = ("#0072b2", "#d55e00")  # told apart by colour-blind eyes too
STYLES: tuple[Any, ...] = ("-", (0, (3, 3)))  # curves that lie on each other are both seen
WINDOW = 25  # iterations in a running mean, odd


def metrics(recipe: Recipe, runs: Mapping[str, Run], backend: str) -> dict[str, Any]:
    """The content of metrics.json: the first run's figures; under "compare" the second's and what sets them apart."""
    (name, run), *others = runs.items()
    result: dict[str, Any] = {
        **asdict(recipe),
        "lstm": name,
        "device": next(run.model.parameters()).device.type,
        "backend": backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **_figures(run),  # the iterations done take the place of those asked for
    }
    for other_name, other in others:
        result["compare"] = {"lstm": other_name, **_figures(other), **compare(run.history, other.history)}
    return result


def summary(metrics: Mapping[str, Any]) -> str:
    """The figures of `metrics` as lines of text, a column for each run."""
    runs = [metrics, metrics["compare"]] if "compare" in metrics else [metrics]
    tested, first = metrics["test_images"], min(128, metrics["test_images"])
    rows = {
        "": [run["lstm"] for run in runs],
        f"test accuracy, first {first}": [f"{first * run['test_accuracy_first_128']:.0f}/{first}" for run in runs],
        f"test accuracy, all {tested}": [f"{run['test_accuracy']:.2%}" for run in runs],
        "validation accuracy": [f"{run['validation_accuracy']:.2%}" for run in runs],
        "iterations": [f"{run['iterations']}{' (interrupted)' * run['interrupted']}" for run in runs],
    }
    if all(run["iterations"] for run in runs):
        rows |= {
            "seconds": [f"{run['seconds']:.1f}" for run in runs],
            "ms per iteration, mean": [f"{run['ms_per_iteration']:.2f}" for run in runs],
            "ms per iteration, median": [f"{run['ms_per_iteration_median']:.2f}" for run in runs],
            "images per second": [f"{run['images_per_second']:.0f}" for run in runs],
        }
    lines = [f"{label:26}" + "".join(f"{cell:>18}" for cell in cells) for label, cells in rows.items()]
    lines[0] += f"   ({metrics['backend']} on {metrics['device']}, {metrics['threads']} CPU threads)"
    if len(runs) == 2 and runs[1]["iterations"]:
        first_100, all_of_them = runs[1]["loss_difference_first_100"], runs[1]["loss_difference"]
        lines += [
            f"largest difference of the losses: first 100 iterations {first_100:.1e}, all {all_of_them:.1e}",
            f"time of {runs[1]['lstm']} / {runs[0]['lstm']}, medians: {runs[1]['time_ratio']:.2f}",
        ]
    return "\n".join(lines)


def write(directory: Path, metrics: Mapping[str, Any], runs: Mapping[str, Run], test: Split) -> None:
    """Write metrics.json, and model.pt and training.png of the first run, each whole or not at all."""
    model = next(iter(runs.values())).model
    with _replacing(directory / "metrics.json") as file:
        file.write((json.dumps(_finite(metrics), indent=1, allow_nan=False) + "\n").encode())
    with _replacing(directory / "model.pt") as file:
        torch.save(_state(model), file)
    with _replacing(directory / "training.png") as file:
        _draw(runs, test).savefig(file, format="png", dpi=110)


def _figures(run: Run) -> dict[str, Any]:
    return {
        **run.history.figures(),
        "validation_accuracy": run.scores.validation_accuracy,
        "test_accuracy": run.scores.test_accuracy,
        "test_accuracy_first_128": run.scores.test_accuracy_first_128,
        "test_images": len(run.scores.predictions),
        "loss": run.history.loss,
        "accuracy": run.history.accuracy,
    }


def _finite(value: Any) -> Any:
    """`value` with null for what JSON cannot say: NaN and infinity."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _state(model: RowLSTM) -> dict[str, Any]:
    """For `torch.load(..., weights_only=True)`: `RowLSTM(**state["config"]).load_state_dict(state["state_dict"])`."""
    config = {
        "input_size": model.lstm.input_size,
        "hidden_size": model.lstm.hidden_size,
        "num_classes": model.linear.out_features,
    }
    return {"config": config, "state_dict": {name: value.cpu() for name, value in model.state_dict().items()}}


def _draw(runs: Mapping[str, Run], test: Split) -> Figure:
    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["loss", "accuracy"], ["mistakes", "mistakes"]])
    for (name, run), colour, style in zip(runs.items(), COLOURS, STYLES, strict=False):
        _draw_curve(axes["loss"], name, run.history.loss, colour, style)
        _draw_curve(axes["accuracy"], name, [100 * value for value in run.history.accuracy], colour, style)
    axes["loss"].set(title="Loss on the training batches", ylabel="cross-entropy (nats)", yscale="log")
    axes["loss"].yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
    )
    axes["accuracy"].set(title="Accuracy on the training batches", ylabel="accuracy (%)", ylim=(0, 101))
    for curve in (axes["loss"], axes["accuracy"]):
        curve.set_xlabel("iteration")
        curve.grid(alpha=0.3)
        curve.legend()
    _draw_mistakes(axes["mistakes"], next(iter(runs.values())), test)
    return figure


def _draw_curve(axes: Axes, name: str, values: Sequence[float], colour: str, style: Any) -> None:
    iterations = np.arange(1, len(values) + 1)
    axes.plot(iterations, values, color=colour, alpha=0.3, linewidth=0.8, label=f"{name}, each batch")
    if len(values) >= WINDOW:
        mean = np.convolve(values, np.full(WINDOW, 1 / WINDOW), mode="valid")
        middle = iterations[WINDOW // 2 : -(WINDOW // 2)]
        axes.plot(middle, mean, color=colour, linestyle=style, label=f"{name}, mean over {WINDOW}")


def _draw_mistakes(axes: Axes, run: Run, test: Split) -> None:
    labels, read = test.labels.cpu(), run.scores.predictions
    wrong = (read != labels).nonzero().flatten().tolist()
    shown = wrong[: ROWS * COLUMNS]
    title = f"{len(wrong)} of {len(labels)} test images read wrongly"
    if len(wrong) > len(shown):
        title += f"; here the first {len(shown)}"
    axes.set_title(f"{title} (true → read)", pad=12)
    axes.set_axis_off()
    rows, columns = test.images.shape[1:]
    height, width = rows + (rows + 1) // 2, columns + (columns + 1) // 2  # of a cell: the label above, a gap beside
    sheet = np.zeros((ROWS * height, COLUMNS * width), np.float32)  # one picture: many axes are slow to draw
    for place, index in enumerate(shown):
        bottom, left = (place // COLUMNS + 1) * height, place % COLUMNS * width
        sheet[bottom - rows : bottom, left : left + columns] = test.images[index].cpu().numpy()
        label = f"{labels[index]} → {read[index]}"
        axes.text(left + columns / 2, bottom - rows - 1, label, ha="center", va="bottom", fontsize=10)
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file of a temporary name beside `path`, given its name once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
