"""The pictures of a run: how it trained, where it errs, how it reads an image step by step.

Their text is grey on a transparent ground, so that it is read on light pages and on dark ones.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from fastlstm.mnist.data import CLASSES, Split
from fastlstm.mnist.history import History
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.training import Run, Scores, predict

ROWS, COLUMNS = 4, 12  # of the grid of mistakes
CONFIDENT_ROWS, CONFIDENT_COLUMNS = 4, 6
COLOURS = ("#0072b2", "#d55e00")  # told apart by colour-blind eyes too
STYLES: tuple[Any, ...] = ("-", (0, (3, 3)))  # curves that lie on each other are both seen
MARKERS = ("o", "x")
WINDOW = 25  # iterations in a running mean, odd; more in a long run
DOTS = 400  # single batches that are drawn of a curve, at most
GREY = "#808080"
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
ON_ANY_GROUND: Any = {
    **dict.fromkeys(COLOURED, GREY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "legend.frameon": False,
}


def on_any_ground(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Return a function that draws a figure to be read on light pages and on dark ones."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with rc_context(ON_ANY_GROUND):
            return draw(*args, **kwargs)

    return drawn


@on_any_ground
def training(runs: Mapping[str, Run], test: Split) -> Figure:
    """Draw the curves of all runs, and the first test images that the first one reads wrongly.

    Several runs also have their accuracy over the seconds of training.
    """
    curves = ["loss", "accuracy", *["time"] * (len(runs) > 1)]
    figure = Figure(figsize=(3 + 4.5 * len(curves), 9), layout="constrained")
    layout: list[Any] = [curves, ["mistakes"] * len(curves)]
    axes = figure.subplot_mosaic(layout)
    for (name, run), colour, style, marker in zip(runs.items(), COLOURS, STYLES, MARKERS, strict=False):
        history, done = run.history, np.arange(1, len(run.history.loss) + 1)
        percent, look = [100 * value for value in history.accuracy], (name, colour, style)
        _draw_curve(axes["loss"], done, history.loss, *look)
        for curve, places in (("accuracy", done), ("time", np.cumsum(history.seconds))):
            if curve in axes:
                _draw_curve(axes[curve], places, percent, *look)
                _draw_validation(axes[curve], places, history, name, colour, marker)
    axes["loss"].set(title="Loss (dots: single batches)", ylabel="cross-entropy (nats)", yscale="log")
    axes["loss"].yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
    )
    lowest = _lowest_accuracy(runs)
    for curve in curves:
        axes[curve].set_xlabel("seconds" if curve == "time" else "iteration")
        axes[curve].grid(alpha=0.3)
    for curve in curves[1:]:
        axes[curve].set(ylabel="accuracy (%)", ylim=(lowest, 100 + (100 - lowest) / 50))
        axes[curve].set_title(f"Accuracy{' over time' * (curve == 'time')} (dots: single batches)")
    figure.legend(*axes["accuracy"].get_legend_handles_labels(), loc="outside upper center", ncols=2 * len(runs) + 1)
    labels, read = test.labels.cpu(), next(iter(runs.values())).scores.predictions
    wrong = (read != labels).nonzero().flatten().tolist()
    shown = wrong[: ROWS * COLUMNS]
    title = f"{len(wrong)} of {len(labels)} test images read wrongly"
    if len(wrong) > len(shown):
        title += f"; here the first {len(shown)}"
    axes["mistakes"].set_title(f"{title} (true → read)", pad=12)
    captions = [f"{labels[index]} → {read[index]}" for index in shown]
    _draw_grid(axes["mistakes"], test.images[shown], captions, ROWS, COLUMNS)
    return figure


@on_any_ground
def mistakes(scores: Scores, test: Split) -> Figure:
    """Draw the confusion matrix, and the mistakes whose wrong class had the highest probability."""
    figure = Figure(figsize=(15, 6.5), layout="constrained")
    matrix_axes, grid_axes = figure.subplots(1, 2, width_ratios=(1, 1.25))
    labels, read = test.labels.cpu(), scores.predictions
    counts = np.zeros((CLASSES, CLASSES), int)
    np.add.at(counts, (labels.numpy(), read.numpy()), 1)
    _draw_confusion(matrix_axes, counts)
    wrong = confident_mistakes(scores, test)[: CONFIDENT_ROWS * CONFIDENT_COLUMNS]
    grid_axes.set_title("The most confident mistakes (true → read, its probability)", pad=12)
    captions = [f"{labels[i]} → {read[i]}, {100 * scores.probabilities[i, read[i]]:.1f} %" for i in wrong]
    _draw_grid(grid_axes, test.images[wrong], captions, CONFIDENT_ROWS, CONFIDENT_COLUMNS)
    return figure


def confident_mistakes(scores: Scores, test: Split) -> list[int]:
    """Return the test images read wrongly, the surest first."""
    sure, read = scores.probabilities.max(1)
    wrong = (read != test.labels.cpu()).nonzero().flatten()
    return wrong[sure[wrong].argsort(descending=True, stable=True)].tolist()


@on_any_ground
def reading(model: RowLSTM, images: Tensor, titles: Sequence[str]) -> Figure:
    """Draw `images` (N, rows, columns), each beside the hidden state and the class probabilities while it is read."""
    model.eval()
    states, probabilities = (part.cpu().numpy() for part in model.read(images))
    answers = predict(model, images).softmax(1).cpu().numpy()  # of both ends, where the model also reads backwards
    steps = states.shape[1]
    unit = "row" if steps == images.shape[1] else "pixel" if steps == images[0].numel() else "step"
    in_order = model.order is None
    figure = Figure(figsize=(14, 3.9 * len(images)), layout="constrained")
    for k, axes in enumerate(figure.subplots(len(images), 3, squeeze=False, width_ratios=(1, 1.9, 1.05))):
        # where the pixels are read in their order, an image is as high as its steps, so that the three are in line
        height, width = steps if in_order else images.shape[1], images.shape[2]
        extent = (-0.5, width - 0.5, height - 0.5, -0.5)
        axes[0].imshow(images[k].cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, extent=extent, aspect="auto")
        axes[0].set_title(_drawable(titles[k]), parse_math=False)
        axes[0].set(
            xlabel="column",
            ylabel=f"{unit}, read top down" if in_order else "row, read in random order",
        )
        state = axes[1].imshow(
            _by_time(states[k]), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
        )
        axes[1].set(title="hidden state", xlabel="hidden unit, ordered by when it is largest", ylabel=f"{unit} read")
        figure.colorbar(state, ax=axes[1], label="h")
        chance = axes[2].imshow(
            100 * probabilities[k], cmap="Blues", vmin=0, vmax=100, aspect="auto", interpolation="nearest"
        )
        axes[2].set(
            title=f"class; in the end {answers[k].argmax()}, {100 * answers[k].max():.1f} %",
            xlabel="class",
            ylabel=f"{unit} read",
            xticks=range(answers.shape[1]),
        )
        figure.colorbar(chance, ax=axes[2], label="probability (%)")
    return figure


def _drawable(text: str) -> str:
    """Return `text` with Python's escapes in place of characters that the font of titles lacks."""
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in text)


def _by_time(states: np.ndarray) -> np.ndarray:
    """Return states (T, H) with the units in the order of the steps at which they are furthest from zero."""
    return states[:, np.argsort(np.abs(states).argmax(0), kind="stable")]


def _draw_confusion(axes: Axes, counts: np.ndarray) -> None:
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    axes.imshow(wrong, cmap="Oranges", vmin=0, vmax=max(1, wrong.max()))
    for true, row in enumerate(counts):
        for read, count in enumerate(row):
            if count:
                dark = true != read and count > 0.6 * wrong.max()
                axes.text(read, true, count, ha="center", va="center", color="white" if dark else "black", fontsize=9)
    right, total = counts.trace(), counts.sum()
    axes.set(
        title=f"{right} of {total} test images read rightly ({100 * right / total:.2f} %); mistakes coloured",
        xlabel="class read",
        ylabel="true class",
        xticks=range(len(counts)),
        yticks=range(len(counts)),
    )


def _draw_validation(axes: Axes, places: np.ndarray, history: History, name: str, colour: str, marker: str) -> None:
    """Draw the accuracies on the validation images, each at the place of the last iteration before it."""
    if history.validation:
        done, accuracies = map(np.array, zip(*history.validation))
        axes.plot(
            places[done - 1],
            100 * accuracies,
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=0,
            fillstyle="none",
            label=f"{name}, validation images",
        )


def _draw_curve(axes: Axes, places: np.ndarray, values: Sequence[float], name: str, colour: str, style: Any) -> None:
    """Draw the running mean of `values` as a line, over dots of some of them."""
    some = slice(None, None, -(-len(values) // DOTS) or 1)
    axes.plot(places[some], values[some], color=colour, alpha=0.3, marker=".", markersize=2, linewidth=0)
    window = max(WINDOW, len(values) // 50 | 1)
    if len(values) >= window:
        mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
        middle = places[window // 2 : -(window // 2)]
        axes.plot(middle, mean, color=colour, linestyle=style, label=f"{name}, mean over {window} batches")


def _lowest_accuracy(runs: Mapping[str, Run]) -> float:
    """Return where the axis of the accuracy begins. It shows the end of a good run, at the cost of its beginning."""
    ends = [np.mean(run.history.accuracy[-WINDOW:] or [0]).item() for run in runs.values()]
    return max(0.0, 100 - 500 * max(0.01, 1 - min(ends)))


def _draw_grid(axes: Axes, images: Tensor, captions: Sequence[str], rows: int, columns: int) -> None:
    """Draw captioned images as one picture, since many axes are slow to draw."""
    axes.set_axis_off()
    size = images.shape[1:]
    height, width = size[0] + (size[0] + 1) // 2, size[1] + (size[1] + 1) // 2  # of a cell: label above, gaps beside
    sheet = np.zeros((rows * height, columns * width), np.float32)
    for place, (image, caption) in enumerate(zip(images.cpu().numpy(), captions, strict=True)):
        bottom, left = (place // columns + 1) * height, place % columns * width + (width - size[1]) // 2
        sheet[bottom - size[0] : bottom, left : left + size[1]] = image
        axes.text(left + size[1] / 2, bottom - size[0] - 1, caption, ha="center", va="bottom", fontsize=10)
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
