"""Train the row-LSTM on MNIST: `python -m fastlstm.train`. The arguments; the work is done in `fastlstm.mnist`."""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from fastlstm import dispatch
from fastlstm.mnist import report
from fastlstm.mnist.data import DataError, Dataset, load
from fastlstm.mnist.training import Recipe, run
from fastlstm.module import LSTM

OURS, THEIRS = "fastlstm.LSTM", "torch.nn.LSTM"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def main(argv: Sequence[str] | None = None) -> int:
    """Train, report and write as `argv` says; the exit code is 0, or 130 after Ctrl-C. A bad argument exits with 2."""
    parser = _arguments()
    args = parser.parse_args(argv)
    try:
        return _run(parser, args)
    except KeyboardInterrupt:  # not while training: that run is reported
        print("interrupted", file=sys.stderr)
        return 130


def _arguments() -> _Parser:
    recipe = Recipe()
    positive = functools.partial(_whole, 1, 2**31 - 1)
    parser = _Parser(
        prog="python -m fastlstm.train",
        description="Train an LSTM that reads each MNIST image row by row, as 28 time steps of 28 pixels.",
        epilog="Ctrl-C ends the training early: what there is is reported and written, and the exit code is 130.",
    )
    add = parser.add_argument
    add(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default: cuda where there is a GPU"
    )
    add("--backend", choices=dispatch.NAMES, help="what runs the LSTM (default: FASTLSTM_BACKEND, else auto)")
    add("--iterations", type=positive, default=recipe.iterations, metavar="N", help="default: %(default)s")
    add("--batch-size", type=positive, default=recipe.batch_size, metavar="N", help="default: %(default)s")
    add("--hidden-size", type=positive, default=recipe.hidden_size, metavar="N", help="default: %(default)s")
    add("--lr", type=_positive_float, default=recipe.lr, metavar="X", help="Adam's step size (default: %(default)s)")
    add(
        "--seed",
        type=functools.partial(_whole, 0, 2**63 - 1),
        default=recipe.seed,
        metavar="N",
        help="of the initial weights and the batches (default: %(default)s)",
    )
    add("--threads", type=positive, metavar="N", help="of the CPU (default: torch's own number)")
    add("--data", type=Path, metavar="DIR", help="another set of four IDX files, gzipped or not (default: MNIST)")
    add("--out", type=Path, metavar="DIR", help="write metrics.json, model.pt and training.png there")
    add("--compare", action="store_true", help=f"also train {THEIRS} from the same weights on the same batches")
    add("--verbose", action="store_true", help="print loss and accuracy every 10 iterations")
    return parser


def _whole(low: int, high: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


def _run(parser: _Parser, args: argparse.Namespace) -> int:
    recipe = Recipe(args.iterations, args.batch_size, args.hidden_size, args.lr, args.seed)
    device, backend = _machine(parser, args)
    data = _data(parser, args, device)
    if args.out:
        _make_directory(parser, args.out)

    lstm_classes: dict[str, Callable[[int, int], nn.RNNBase]] = {OURS: functools.partial(LSTM, backend=args.backend)}
    if args.compare:
        lstm_classes[THEIRS] = nn.LSTM
    runs = run(lstm_classes, data, recipe, verbose=args.verbose)
    metrics = report.metrics(recipe, runs, backend)
    print(report.summary(metrics))
    if args.out:
        report.write(args.out, metrics, runs, data.test)
        print(f"metrics.json, model.pt and training.png are in {args.out}")
    return 130 if any(each.history.interrupted for each in runs.values()) else 0


def _machine(parser: _Parser, args: argparse.Namespace) -> tuple[torch.device, str]:
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda needs a GPU that torch can use, found none")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        backend = dispatch.choose(args.backend, device, torch.float32, projected=False, masked=False, cells=False)
    except RuntimeError as error:
        parser.error(f"argument --backend: {error}")
    return device, backend


def _data(parser: _Parser, args: argparse.Namespace, device: torch.device) -> Dataset:
    try:
        data = load(args.data, device)
    except DataError as error:
        parser.error(f"argument --data: {error}")
    if args.batch_size > len(data.train.labels):
        parser.error(
            f"argument --batch-size: must be at most {len(data.train.labels)}, the number of training images, "
            f"got {args.batch_size}"
        )
    return data


def _make_directory(parser: _Parser, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: must be a directory or the name of a new one, got {path} ({error.strerror})")
    if not os.access(path, os.W_OK):
        parser.error(f"argument --out: must be a directory that can be written, got {path}")


if __name__ == "__main__":
    sys.exit(main())
