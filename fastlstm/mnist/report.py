"""What a run says at its end and leaves behind: metrics.json, model.pt and the pictures."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastlstm.files import replacing
from fastlstm.mnist import saved
from fastlstm.mnist.data import Split
from fastlstm.mnist.recipe import Recipe
from fastlstm.mnist.state import History
from fastlstm.mnist.training import Run

NEEDED = "needs the package matplotlib; pip install 'fastlstm[plots]'"


def metrics(recipe: Recipe, runs: Mapping[str, Run], backend: str) -> dict[str, Any]:
    """Return the content of metrics.json: the first run's figures, and under "compare" those of a second beside it."""
    figures = [{"lstm": name, **_figures(run)} for name, run in runs.items()]
    result: dict[str, Any] = {
        **asdict(recipe),
        "device": next(next(iter(runs.values())).model.parameters()).device.type,
        "backend": backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **figures[0],  # the iterations done take the place of those asked for
    }
    if len(runs) > 1:
        result["compare"] = {**figures[1], **compare(*(run.history for run in runs.values()))}
    return result


def _figures(run: Run) -> dict[str, Any]:
    history, scores = run.history, run.scores
    done, seconds = len(history.loss), history.seconds
    return {
        "iterations": done,
        "interrupted": history.interrupted,
        "seconds": seconds,
        "ms_per_iteration": 1000 * seconds / done if done else None,
        "validation_accuracy": scores.validation_accuracy,
        "test_accuracy": scores.test_accuracy,
        "test_accuracy_first_128": scores.test_accuracy_first_128,
        "test_images": len(scores.predictions),
        "loss": history.loss,
        "accuracy": history.accuracy,
        "validation": [{"iterations": done, "accuracy": value} for done, value in history.validation.items()],
    }


def compare(ours: History, theirs: History) -> dict[str, float | None]:
    """Return the largest difference of two loss curves, over what both did, and the ratio of their time to ours."""
    both = min(len(ours.loss), len(theirs.loss))
    if not both:
        return dict.fromkeys(("loss_difference", "time_ratio"))
    largest = np.abs(np.subtract(ours.loss[:both], theirs.loss[:both])).max().item()  # NaN where a loss is
    ratio = theirs.seconds / len(theirs.loss) / (ours.seconds / len(ours.loss))
    return {"loss_difference": largest, "time_ratio": ratio}


def summary(metrics: Mapping[str, Any]) -> str:
    """Return the figures of `metrics` as lines of text, a column for each run."""
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
        rows["seconds"] = [f"{run['seconds']:.1f}" for run in runs]
        rows["ms per iteration"] = [f"{run['ms_per_iteration']:.2f}" for run in runs]
    lines = [f"{label:28}" + "".join(f"{cell:>18}" for cell in cells) for label, cells in rows.items()]
    lines[0] += f"   ({metrics['backend']} on {metrics['device']}, {metrics['threads']} CPU threads)"
    if "compare" in metrics and runs[1]["iterations"]:
        lines += [
            f"largest difference of the losses: {runs[1]['loss_difference']:.1e}",
            f"time of {runs[1]['lstm']} / {runs[0]['lstm']}: {runs[1]['time_ratio']:.2f}",
        ]
    return "\n".join(lines)


def write(directory: Path, metrics: Mapping[str, Any], runs: Mapping[str, Run], test: Split) -> None:
    """Write metrics.json, and model.pt and the pictures of the first run, each whole or not at all."""
    finite = json.loads(json.dumps(metrics), parse_constant=lambda name: None)  # JSON has no NaN and no infinity
    with replacing(directory / "metrics.json") as file:
        file.write((json.dumps(finite, indent=1) + "\n").encode())
    saved.save(directory / saved.MODEL, next(iter(runs.values())).model, test.images.shape[1:])
    if can_draw():
        from fastlstm.mnist import pictures  # not above: it imports matplotlib

        for name, figure in pictures.of_runs(runs, test).items():
            draw(directory / f"{name}.png", figure)


def can_draw() -> bool:
    """Return whether matplotlib is there, which is an extra of this package."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, figure: Any) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)
