"""The pictures of a run: how it trained, where it errs, how it reads an image; grey text for light and dark pages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastlstm.mnist.data import CLASSES, Split
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.training import Run, Scores, predict

ROWS, COLUMNS = 4, 6  # of the grid of mistakes
# (colour, line, marker) of each run. Colour-blind eyes tell the colours apart, and curves that lie on each other show.
LOOKS: tuple[Any, ...] = (("#0072b2", "-", "o"), ("#d55e00", (0, (3, 3)), "x"))
GREY = "#808080"
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
ON_ANY_GROUND: Any = {
    **dict.fromkeys(COLOURED, GREY),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    "legend.frameon": False,
}


def of_runs(runs: Mapping[str, Run], test: Split) -> dict[str, Figure]:
    """Return the pictures by name: how all runs trained, where the first one errs, how it reads."""
    model, _, scores = next(iter(runs.values()))
    right = (scores.predictions == test.labels.cpu()).nonzero().flatten().tolist()
    read = right[:1] + confident_mistakes(scores, test)[:1]
    titles = [f"test image {index}, a {test.labels[index]}" for index in read]
    return {
        "training": training(runs),
        "mistakes": mistakes(scores, test),
        "reading": reading(model, test.images[read], titles),
    }


@rc_context(ON_ANY_GROUND)
def training(runs: Mapping[str, Run]) -> Figure:
    """Draw loss and accuracy of all runs as means over a fiftieth of the iterations, and the validation accuracies."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for (name, run), (colour, line, marker) in zip(runs.items(), LOOKS, strict=False):
        done, validation = len(run.history.loss), run.history.validation
        window = done // 50 or 1
        for axes, values in ((loss, run.history.loss), (accuracy, run.history.accuracy)):
            sums = np.cumsum([0.0, *values])
            mean, label = (sums[window:] - sums[:-window]) / window, f"{name}, mean over {window} batches"
            axes.plot(np.arange(len(mean)) + window, mean, color=colour, linestyle=line, label=label)
        look: Any = {"color": colour, "marker": marker, "linewidth": 0, "fillstyle": "none"}
        accuracy.plot([*validation], [*validation.values()], **look, label=f"{name}, validation images")
    loss.set(title="Loss", ylabel="cross-entropy (nats)", xlabel="iteration", yscale="log")
    lowest = 5 * min(run.scores.test_accuracy for run in runs.values()) - 4  # shows the end of a good run
    accuracy.set(title="Accuracy", xlabel="iteration", ylim=(max(0, lowest), 1.005))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs))
    return figure


@rc_context(ON_ANY_GROUND)
def mistakes(scores: Scores, test: Split) -> Figure:
    """Draw the confusion matrix, and the mistakes whose wrong class had the highest probability."""
    figure = Figure(figsize=(9, 11), layout="constrained")
    matrix_axes, grid_axes = figure.subplots(2, 1, height_ratios=(1, 1))
    labels, read = test.labels.cpu(), scores.predictions
    _draw_confusion(matrix_axes, labels, read)
    wrong = confident_mistakes(scores, test)[: ROWS * COLUMNS]
    grid_axes.set_title("The most confident mistakes (true → read, its probability)", pad=12)
    captions = [f"{labels[i]} → {read[i]}, {100 * scores.probabilities[i, read[i]]:.1f} %" for i in wrong]
    _draw_grid(grid_axes, test.images[wrong], captions)
    return figure


def confident_mistakes(scores: Scores, test: Split) -> list[int]:
    """Return the test images read wrongly, the surest first."""
    sure, read = scores.probabilities.max(1)
    wrong = (read != test.labels.cpu()).nonzero().flatten()
    return wrong[sure[wrong].argsort(descending=True, stable=True)].tolist()


@rc_context(ON_ANY_GROUND)
def reading(model: RowLSTM, images: Tensor, titles: Sequence[str]) -> Figure:
    """Draw `images` (N, rows, columns), each beside the hidden state and the class probabilities while it is read."""
    model.eval()
    states, probabilities = (part.cpu().numpy() for part in model.read(images))
    answers = predict(model, images).softmax(1).cpu().numpy()  # of both ends, where the model also reads backwards
    steps, width = states.shape[1], images.shape[2]
    unit = "row" if steps == images.shape[1] else "pixel" if steps == images[0].numel() else "step"
    heat: Any = {"aspect": "auto", "interpolation": "nearest"}
    figure = Figure(figsize=(10, 3.4 * len(images)), layout="constrained")
    for k, axes in enumerate(figure.subplots(len(images), 3, squeeze=False, width_ratios=(1, 1.9, 1.05))):
        extent = (-0.5, width - 0.5, steps - 0.5, -0.5)  # as high as its steps, so that the three are in line
        axes[0].imshow(images[k].cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, extent=extent, aspect="auto")
        axes[0].set_title(titles[k], parse_math=False)
        axes[0].set(xlabel="column", ylabel=f"{unit}, read top down")
        order = np.argsort(np.abs(states[k]).argmax(0), kind="stable")
        state = axes[1].imshow(states[k][:, order], cmap="RdBu_r", vmin=-1, vmax=1, **heat)
        axes[1].set(title="hidden state", xlabel="hidden unit, ordered by when it is largest", ylabel=f"{unit} read")
        figure.colorbar(state, ax=axes[1], label="h")
        chance = axes[2].imshow(100 * probabilities[k], cmap="Blues", vmin=0, vmax=100, **heat)
        answer = f"class; in the end {answers[k].argmax()}, {100 * answers[k].max():.1f} %"
        axes[2].set(title=answer, xlabel="class", ylabel=f"{unit} read", xticks=range(answers.shape[1]))
        figure.colorbar(chance, ax=axes[2], label="probability (%)")
    return figure


def _draw_confusion(axes: Axes, labels: Tensor, read: Tensor) -> None:
    counts = np.zeros((CLASSES, CLASSES), int)
    np.add.at(counts, (labels.numpy(), read.numpy()), 1)
    wrong = counts * (1 - np.eye(CLASSES, dtype=int))
    axes.imshow(wrong, cmap="Oranges", vmin=0, vmax=max(1, wrong.max()))
    for true, found in zip(*counts.nonzero(), strict=True):
        colour = "white" if wrong[true, found] > 0.6 * wrong.max() else "black"  # on dark orange, on pale orange
        axes.text(found, true, counts[true, found], ha="center", va="center", color=colour, fontsize=9)
    right, total = counts.trace(), counts.sum()
    axes.set_title(f"{right} of {total} test images read rightly ({100 * right / total:.2f} %); mistakes coloured")
    axes.set(xlabel="class read", ylabel="true class", xticks=range(CLASSES), yticks=range(CLASSES))


def _draw_grid(axes: Axes, images: Tensor, captions: Sequence[str]) -> None:
    """Draw captioned images as one picture, since many axes are slow to draw."""
    axes.set_axis_off()
    rows, columns = images.shape[1:]
    height, width = rows * 3 // 2, columns * 3 // 2  # of a cell: label above, gaps beside
    sheet = np.zeros((ROWS * height, COLUMNS * width), np.float32)
    for place, (image, caption) in enumerate(zip(images.cpu().numpy(), captions, strict=True)):
        bottom, left = (place // COLUMNS + 1) * height, place % COLUMNS * width
        sheet[bottom - rows : bottom, left : left + columns] = image
        axes.text(left + columns / 2, bottom - rows - 1, caption, ha="center", va="bottom", fontsize=10)
    axes.imshow(sheet, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
