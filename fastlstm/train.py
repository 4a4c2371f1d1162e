"""Train the row-LSTM on MNIST: `python -m fastlstm.train`. The arguments; the work is done in `fastlstm.mnist`."""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlstm.backends import dispatch, settings
from fastlstm.backends.base import WEIGHTS, Layer
from fastlstm.cells.library import lstm
from fastlstm.commands import Parser, positive, positive_float, probability, whole_number
from fastlstm.files import FileError
from fastlstm.layers.lstm import LSTM
from fastlstm.mnist import checkpoint, report, saved
from fastlstm.mnist.board import Board
from fastlstm.mnist.checkpoint import CheckpointError, Keeper
from fastlstm.mnist.data import DataError, Dataset, fingerprint, load
from fastlstm.mnist.model import TorchLSTM, lacks_bf16
from fastlstm.mnist.processes import joined, started
from fastlstm.mnist.recipe import PARTS, RECIPES, Recipe, iterations
from fastlstm.mnist.training import run

OURS, THEIRS = "fastlstm.LSTM", "torch.nn.LSTM"
CHECKPOINTS = {OURS: checkpoint.NAME, THEIRS: "checkpoint-compare.pt"}
OPTIONS = tuple(field.name for field in fields(Recipe))  # each is an argument, too
FIXED = (*OPTIONS, "recipe", "epochs", "backend", "compare", "out")  # once a run has begun


EXAMPLES = """\
Ctrl-C ends the training early, and so does a full disk. What there is is
reported and written; --resume goes on from the last checkpoint.

examples:
  the tutorial's recipe, in seconds
    python -m fastlstm.train
  the accuracy that such a model can reach, beside torch.nn.LSTM
    python -m fastlstm.train --recipe best --compare --out runs/best
  a run that was cut short
    python -m fastlstm.train --resume runs/best
  two layers in both directions, on other images
    python -m fastlstm.train --data DIR --layers 2 --bidirectional
  pixel by pixel
    python -m fastlstm.train --steps 784
  on two processes, each with half of every batch
    torchrun --nproc-per-node=2 -m fastlstm.train --out runs/two
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, report and write as `argv` says; the exit code is 0, or 130 after Ctrl-C. A bad argument exits with 2."""
    recipe = Recipe()
    parser = Parser(
        prog="python -m fastlstm.train",
        description="Train an LSTM that reads each MNIST image row by row, 28 steps of 28 pixels.",
        epilog=EXAMPLES,
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--recipe",
        choices=RECIPES,
        help="tutorial, the default: plain Adam; best: 15 epochs of moved images, averaged weights",
    )
    length = training.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=positive, metavar="N", help=f"default: {recipe.iterations}")
    length.add_argument("--epochs", type=positive, metavar="N", help="passes over the training images instead")
    add = training.add_argument
    add("--batch-size", type=positive, metavar="N", help=f"over all processes (default: {recipe.batch_size})")
    add("--lr", type=positive_float, metavar="X", help=f"Adam's step size, the largest (default: {recipe.lr})")
    seed = functools.partial(whole_number, 0, 2**63 - 1)
    add("--seed", type=seed, metavar="N", help=f"of the initial weights and the batches (default: {recipe.seed})")
    add("--parts", nargs="*", choices=PARTS, help="what is added to plain Adam, in the place of the recipe's own parts")
    add("--compare", action="store_true", default=None, help=f"also train {THEIRS} from the same weights and batches")

    add = parser.add_argument_group("model").add_argument
    add("--hidden-size", type=positive, metavar="N", help=f"default: {recipe.hidden_size}")
    add("--layers", type=positive, metavar="N", help=f"of the LSTM (default: {recipe.layers})")
    add("--bidirectional", action="store_true", default=None, help="also read from the last step to the first")
    add("--proj-size", type=positive, metavar="N", help="project the hidden state to N features")
    add("--dropout", type=probability, metavar="P", help="between the layers and on the last state (default: 0)")

    add = parser.add_argument_group("images").add_argument
    add("--data", type=Path, metavar="DIR", help="another set of four IDX files, gzipped or not (default: MNIST)")
    add("--steps", type=positive, metavar="N", help="read the pixels in N steps: 784, one by one (default: by row)")
    add("--permuted", action="store_true", default=None, help="read the pixels in one fixed random order")

    add = parser.add_argument_group("machine").add_argument
    add(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default: cuda where there is a GPU"
    )
    backends = "what runs the LSTM: %(choices)s (default: FASTLSTM_BACKEND, else auto)"
    add("--backend", choices=settings.NAMES, metavar="NAME", help=backends)
    add("--threads", type=positive, metavar="N", help="of the CPU (default: torch's own number)")
    add("--precision", choices=("fp32", "bf16"), help="bf16: under torch.autocast (default: fp32)")
    add("--compile", action="store_true", default=None, help="run the model through torch.compile")

    add = parser.add_argument_group("what is written, and going on").add_argument
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="write metrics.json, model.pt, checkpoints and pictures there, in place of an earlier run's "
        f"(default: {saved.DIRECTORY})",
    )
    add("--resume", type=Path, metavar="DIR", help="continue the run that wrote to DIR where its last checkpoint is")
    add("--checkpoint-every", type=positive, default=200, metavar="N", help="iterations (default: %(default)s)")
    add("--tensorboard", type=Path, metavar="DIR", help="log there for TensorBoard (extra: fastlstm[tensorboard])")
    add("--verbose", action="store_true", help="print loss and accuracy every 10 iterations")
    return parser.run(argv, _run)


def _run(parser: Parser, args: argparse.Namespace) -> int:
    processes = started()
    resumed = _resumed(parser, args) if args.resume else None
    device = _device(parser, args)
    data = _data(parser, args, device)
    recipe = Recipe(**resumed["recipe"]) if resumed else _recipe(parser, args, data)
    if recipe.batch_size % processes.number:
        parser.error(
            f"argument --batch-size: must be a multiple of {processes.number}, the number of processes, "
            f"got {recipe.batch_size}"
        )
    backend = _backend(parser, args, device, recipe)
    board = _board(parser, args) if args.tensorboard and processes.rank == 0 else None
    out = args.resume or args.out or Path(saved.DIRECTORY)
    parser.make_directory("--resume" if args.resume else "--out", out)

    lstm_classes: dict[str, Callable[..., nn.RNNBase]] = {OURS: functools.partial(LSTM, backend=args.backend)}
    if args.compare:
        lstm_classes[THEIRS] = TorchLSTM
        if recipe.precision == "bf16" and device.type == "cpu" and lacks_bf16() and not processes.rank:
            print(f"{THEIRS} runs without oneDNN, which has no bf16 on this processor")
    replaces = not args.resume and (out / saved.NAME).exists()
    about = {"recipe": asdict(recipe), "backend": backend, "images": fingerprint(data.train)}
    keepers = _keepers(args, out, about)
    try:
        with joined(processes, device):
            runs = run(
                lstm_classes,
                data,
                recipe,
                verbose=args.verbose,
                keepers=keepers,
                board=board,
                processes=processes,
            )
    except CheckpointError as error:
        parser.error(f"argument --resume: {error}")
    if processes.rank:
        return 0
    trouble = next((each.history.trouble for each in runs.values() if each.history.trouble), "")
    rows = recipe.batch_size // processes.number
    backend = _backend(parser, args, device, recipe, _first_layer(runs[OURS].model.lstm, recipe, rows))  # that ran
    metrics = report.metrics(recipe, runs, backend, processes.number)
    if trouble and not metrics["iterations"]:
        parser.error(trouble)  # there is nothing to report
    try:  # before the figures are printed: standard output may be what cannot be written
        report.write(out, metrics, runs, data.test)
    except FileError as error:
        trouble = str(error)
    print(report.summary(metrics))
    if trouble:
        parser.error(f"{trouble}; continue with --resume {out}")
    written = "metrics.json, model.pt and the pictures" if report.can_draw() else "metrics.json and model.pt"
    print(f"{written} are in {out}{', in place of those of an earlier run' * replaces}")
    if not report.can_draw():
        print(f"the pictures are left out: drawing {report.NEEDED}")
    if board:
        board.close(metrics["iterations"], report.draw(runs, data.test))
    if any(each.history.interrupted for each in runs.values()):
        print(f"continue with --resume {out}")
        return 130
    return 0


def _resumed(parser: Parser, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the run in `args.resume` is about, and put the arguments that it was begun with into `args`."""
    for name in FIXED:
        if getattr(args, name) is not None:
            parser.error(f"argument --{name.replace('_', '-')}: must be left out with --resume, the run keeps its own")
    try:
        content = checkpoint.load(args.resume / CHECKPOINTS[OURS])
    except CheckpointError as error:
        parser.error(f"argument --resume: {error}")
    begun = content["begun"]
    args.backend, args.compare = begun["backend"], begun["compare"]
    args.threads = args.threads or begun["threads"]
    args.data = args.data or (Path(begun["data"]) if begun["data"] else None)
    return content["about"]


def _keepers(args: argparse.Namespace, out: Path, about: dict[str, Any]) -> dict[str, Keeper]:
    if not args.resume and started().rank == 0:
        for name in CHECKPOINTS.values():  # of an earlier run in this directory
            (out / name).unlink(missing_ok=True)
    begun = {
        "backend": args.backend,
        "compare": args.compare,
        "threads": args.threads,
        "data": str(args.data.resolve()) if args.data else None,
    }
    return {
        lstm: Keeper(out / name, {**about, "lstm": lstm}, begun, args.checkpoint_every, bool(args.resume))
        for lstm, name in CHECKPOINTS.items()
    }


def _recipe(parser: Parser, args: argparse.Namespace, data: Dataset) -> Recipe:
    chosen = dict(RECIPES[args.recipe or "tutorial"])
    chosen |= {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    chosen["parts"] = tuple(part for part in PARTS if part in chosen.get("parts", ()))  # in one order
    images, batch_size = len(data.train.labels), chosen.get("batch_size", Recipe.batch_size)
    if batch_size > images:
        parser.error(
            f"argument --batch-size: must be at most {images}, the number of training images, got {batch_size}"
        )
    epochs = chosen.pop("epochs", None)
    epochs = args.epochs or epochs
    if epochs and not args.iterations:
        chosen["iterations"] = iterations(epochs, images, batch_size)
    recipe = Recipe(**chosen)
    pixels = data.train.images[0].numel()
    if recipe.steps is not None and pixels % recipe.steps:
        parser.error(f"argument --steps: must divide {pixels}, the number of pixels, got {recipe.steps}")
    if recipe.proj_size >= recipe.hidden_size:
        parser.error(
            f"argument --proj-size: must be below the hidden size, {recipe.hidden_size}, got {recipe.proj_size}"
        )
    return recipe


def _device(parser: Parser, args: argparse.Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda needs a GPU that torch can use, found none")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def _dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.precision == "bf16" else torch.float32


def _first_layer(module: nn.RNNBase, recipe: Recipe, rows: int) -> Layer:
    """Return a layer like that which the first layer of a module runs in training, on so many batch rows."""
    weights = tuple(a.to(_dtype(recipe)) for a in module.all_weights[0][:WEIGHTS])
    x = weights[0].new_zeros(1, rows, module.input_size)
    return Layer(x, weights, (None,) * len(lstm.states), None, None, False, lstm)


def _backend(
    parser: Parser, args: argparse.Namespace, device: torch.device, recipe: Recipe, layer: Layer | None = None
) -> str:
    """Return the backend that is to run layers, or with a `layer` the one that has run it: its first call may fail."""
    options: dict[str, Any] = {"cell": lstm, "projected": recipe.proj_size > 0, "masked": False, "inner_states": False}
    try:
        return dispatch.choose(args.backend, device, _dtype(recipe), **options, layer=layer)
    except RuntimeError as error:
        parser.error(f"argument --backend: {error}")


def _data(parser: Parser, args: argparse.Namespace, device: torch.device) -> Dataset:
    try:
        return load(args.data, device)
    except DataError as error:
        parser.error(f"argument --data: {error}")


def _board(parser: Parser, args: argparse.Namespace) -> Board:
    parser.make_directory("--tensorboard", args.tensorboard)
    try:
        return Board(args.tensorboard)
    except ImportError:
        parser.error("argument --tensorboard: needs the package tensorboard; pip install 'fastlstm[tensorboard]'")


if __name__ == "__main__":
    sys.exit(main())
