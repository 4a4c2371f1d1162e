"""What a run says at its end and leaves behind: metrics.json, model.pt and the pictures."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlstm.files import replacing
from fastlstm.mnist import saved
from fastlstm.mnist.data import Split
from fastlstm.mnist.history import compare
from fastlstm.mnist.recipe import Recipe
from fastlstm.mnist.training import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDED = "needs the package matplotlib; pip install 'fastlstm[plots]'"
TARGET = 0.99  # the validation accuracy whose time is reported


def metrics(recipe: Recipe, runs: Mapping[str, Run], backend: str, processes: int = 1) -> dict[str, Any]:
    """Return the content of metrics.json: the first run's figures, and under "compare" the second run's and the
    differences between the two.
    """
    (name, run), *others = runs.items()
    result: dict[str, Any] = {
        **asdict(recipe),
        "lstm": name,
        "device": next(run.model.parameters()).device.type,
        "backend": backend,
        "threads": torch.get_num_threads(),
        "processes": processes,
        "torch": torch.__version__,
        **_figures(run),  # the iterations done take the place of those asked for
    }
    for other_name, other in others:
        result["compare"] = {"lstm": other_name, **_figures(other), **compare(run.history, other.history)}
    return result


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
        rows |= {
            "seconds": [f"{run['seconds']:.1f}" for run in runs],
            "ms per iteration, mean": [f"{run['ms_per_iteration']:.2f}" for run in runs],
            "ms per iteration, median": [f"{run['ms_per_iteration_median']:.2f}" for run in runs],
            "images per second": [f"{run['images_per_second']:.0f}" for run in runs],
        }
    if any(run["time_to_99"] for run in runs):
        times = [f"{run['time_to_99']['seconds']:.1f}" if run["time_to_99"] else "" for run in runs]
        rows["seconds to 99 %, validation"] = times
    lines = [f"{label:28}" + "".join(f"{cell:>18}" for cell in cells) for label, cells in rows.items()]
    lines[0] += f"   ({metrics['backend']} on {metrics['device']}, {metrics['threads']} CPU threads)"
    if len(runs) == 2 and runs[1]["iterations"]:
        first_100, all_of_them = runs[1]["loss_difference_first_100"], runs[1]["loss_difference"]
        lines += [
            f"largest difference of the losses: first 100 iterations {first_100:.1e}, all {all_of_them:.1e}",
            f"time of {runs[1]['lstm']} / {runs[0]['lstm']}, medians: {runs[1]['time_ratio']:.2f}",
        ]
    return "\n".join(lines)


def write(directory: Path, metrics: Mapping[str, Any], runs: Mapping[str, Run], test: Split) -> None:
    """Write metrics.json, and model.pt and the pictures of the first run, each whole or not at all."""
    run = next(iter(runs.values()))
    with replacing(directory / "metrics.json") as file:
        file.write((json.dumps(_finite(metrics), indent=1, allow_nan=False) + "\n").encode())
    saved.save(directory / saved.NAME, run.model, test.images.shape[1:])
    for name, figure in draw(runs, test).items():
        with replacing(directory / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=110)


def can_draw() -> bool:
    """Return whether matplotlib is there, which is an extra of this package."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(runs: Mapping[str, Run], test: Split) -> dict[str, Figure]:
    """Return the pictures of a run by name: how it trained, where it errs, how it reads. Without matplotlib the dict is
    empty.
    """
    if not can_draw():
        return {}
    from fastlstm.mnist import pictures  # not above: it imports matplotlib

    run = next(iter(runs.values()))
    wrong = pictures.confident_mistakes(run.scores, test)[:1]
    right = (run.scores.predictions == test.labels.cpu()).nonzero().flatten().tolist()[:1]
    read = right + wrong
    titles = [f"test image {index}, a {test.labels[index]}" for index in read]
    drawn = {"training": pictures.training(runs, test), "mistakes": pictures.mistakes(run.scores, test)}
    if read:
        drawn["reading"] = pictures.reading(run.model, test.images[read], titles)
    return drawn


def _figures(run: Run) -> dict[str, Any]:
    return {
        **run.history.figures(),
        "validation_accuracy": run.scores.validation_accuracy,
        "test_accuracy": run.scores.test_accuracy,
        "test_accuracy_first_128": run.scores.test_accuracy_first_128,
        "test_images": len(run.scores.predictions),
        "loss": run.history.loss,
        "accuracy": run.history.accuracy,
        "validation": [{"iterations": done, "accuracy": accuracy} for done, accuracy in run.history.validation],
        "time_to_99": run.history.reached(TARGET),
    }


def _finite(value: Any) -> Any:
    """Return `value` with None in the place of NaN and infinity, for which JSON has no number."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
