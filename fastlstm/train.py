"""Train the row-LSTM on MNIST: `python -m fastlstm.train`. The arguments; the work is done in `fastlstm.mnist`."""

import argparse
import functools
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlstm.backends import dispatch, settings
from fastlstm.backends.base import Layer
from fastlstm.cells.library import lstm
from fastlstm.commands import Parser, positive, positive_float, probability, whole_number
from fastlstm.layers.lstm import LSTM
from fastlstm.mnist import report, saved
from fastlstm.mnist.data import DataError, Dataset, Split, load
from fastlstm.mnist.recipe import PARTS, RECIPES, Recipe, iterations
from fastlstm.mnist.state import Checkpoint
from fastlstm.mnist.training import build, run

OURS, THEIRS = "fastlstm.LSTM", "torch.nn.LSTM"
OPTIONS = tuple(field.name for field in fields(Recipe))  # each is an argument, too
KEPT = (*OPTIONS, "recipe", "epochs", "backend", "compare")  # for the whole of a run
EXAMPLES = """\
Ctrl-C ends the training early. What there is is reported and written;
--resume goes on from the last checkpoint.

examples:
  the tutorial's recipe, in seconds
    python -m fastlstm.train
  the accuracy that such a model can reach, beside torch.nn.LSTM
    python -m fastlstm.train --recipe best --compare --out runs/best
  a run that was cut short
    python -m fastlstm.train --resume runs/best
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Train, report and write as `argv` says; the exit code is 0, or 130 after Ctrl-C. A bad argument exits with 2."""
    recipe = Recipe()
    description = "Train an LSTM that reads each MNIST image row by row, 28 steps of 28 pixels."
    parser = Parser("python -m fastlstm.train", description, EXAMPLES)
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--recipe", choices=RECIPES, help="best: 15 epochs of moved images, averaged weights (default: tutorial)")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=positive, metavar="N", help=f"default: {recipe.iterations}")
    length.add_argument("--epochs", type=positive, metavar="N", help="passes over the training images instead")
    add("--batch-size", type=positive, metavar="N", help=f"default: {recipe.batch_size}")
    add("--lr", type=positive_float, metavar="X", help=f"Adam's step size (default: {recipe.lr})")
    seed = functools.partial(whole_number, 0, 2**63 - 1)
    add("--seed", type=seed, metavar="N", help=f"of the initial weights and the batches (default: {recipe.seed})")
    parts = "what is added to plain Adam, in the place of the recipe's own parts"
    add("--parts", nargs="*", action="extend", choices=PARTS, help=parts)
    add("--compare", action="store_true", default=None, help=f"also train {THEIRS} from the same weights and batches")

    add = parser.add_argument_group("model").add_argument
    add("--hidden-size", type=positive, metavar="N", help=f"default: {recipe.hidden_size}")
    add("--layers", type=positive, metavar="N", help=f"of the LSTM (default: {recipe.layers})")
    add("--bidirectional", action="store_true", default=None, help="also read from the last step to the first")
    add("--dropout", type=probability, metavar="P", help="between the layers and on the last state (default: 0)")

    add = parser.add_argument_group("images").add_argument
    add("--data", type=Path, metavar="DIR", help="another set of four IDX files, gzipped or not (default: MNIST)")
    add("--steps", type=positive, metavar="N", help="read the pixels in N steps: 784, one by one (default: by row)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto, the default: cuda where there is one")
    add("--backend", choices=settings.NAMES, metavar="NAME", help="%(choices)s (default: FASTLSTM_BACKEND, else auto)")
    add("--threads", type=positive, metavar="N", help="of the CPU (default: torch's own number)")
    add("--precision", choices=("fp32", "bf16"), help="bf16: under torch.autocast (default: fp32)")
    add("--compile", action="store_true", default=None, help="run the model through torch.compile")

    add = parser.add_argument_group("what is written, and going on").add_argument
    out = f"where all files are written, in place of an earlier run's (default: {saved.DIRECTORY})"
    add("--out", type=Path, metavar="DIR", help=out)
    add("--resume", type=Path, metavar="DIR", help="continue the run that wrote to DIR where its last checkpoint is")
    add("--checkpoint-every", type=positive, default=200, metavar="N", help="iterations (default: %(default)s)")
    return parser.run(argv, _run)


def _run(parser: Parser, args: argparse.Namespace) -> int:
    out = args.resume or args.out or Path(saved.DIRECTORY)
    path, argument = out / saved.CHECKPOINT, "--resume" if args.resume else "--out"
    content: dict[str, Any] = {"states": {}}
    if args.resume:
        for name in (*KEPT, "out"):
            if getattr(args, name) is not None:
                parser.error(
                    f"argument --{name.replace('_', '-')}: must be left out with --resume, the run keeps its own"
                )
        with parser.naming(argument, DataError), saved.refusing(path, "a checkpoint of fastlstm.train"):
            content = saved.read(path)
            vars(args).update(content["options"])
            args.data = args.data or content["data"]
    device = _device(parser, args)
    with parser.naming("--data", DataError):
        data = load(Path(args.data) if args.data else None, device)
    recipe = _recipe(parser, args, data)
    with parser.naming("--backend", RuntimeError):
        backend = _backend(args.backend, data.train, recipe)
    parser.make_directory(argument, out)
    images = zlib.crc32(b"".join(part.cpu().numpy().tobytes() for part in data.train))
    if content.setdefault("images", images) != images:
        parser.error(f"argument --resume: {path}: a run on other images than those of {args.data or 'MNIST'}")
    content["options"] = {**{name: getattr(args, name) for name in KEPT}, "backend": backend}
    content["data"] = str(Path(args.data).resolve()) if args.data else ""
    if not args.resume:
        saved.write(path, content)  # in the place of an earlier run's
    lstm_classes: dict[str, Callable[..., nn.RNNBase]] = {OURS: functools.partial(LSTM, backend=args.backend)}
    if args.compare:
        lstm_classes[THEIRS] = nn.LSTM
    runs = run(lstm_classes, data, recipe, checkpoint=Checkpoint(path, content, args.checkpoint_every))
    metrics = report.metrics(recipe, runs, backend)
    report.write(out, metrics, runs, data.test)
    print(report.summary(metrics))
    left_out = "" if report.can_draw() else f"; the pictures are left out: drawing {report.NEEDED}"
    print(f"what the run leaves behind is in {out}{left_out}")
    if any(each.history.interrupted for each in runs.values()):
        print(f"continue with --resume {out}")
        return 130
    return 0


def _recipe(parser: Parser, args: argparse.Namespace, data: Dataset) -> Recipe:
    chosen = dict(RECIPES[args.recipe or "tutorial"])
    epochs = chosen.pop("epochs", None)
    chosen |= {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    chosen["parts"] = tuple(part for part in PARTS if part in chosen.get("parts", ()))  # in one order
    images, batch_size = len(data.train.labels), chosen.get("batch_size", Recipe.batch_size)
    if batch_size > images:
        parser.error(f"argument --batch-size: must be at most {images}, the number of images, got {batch_size}")
    if (epochs := args.epochs or epochs) and not args.iterations:
        chosen["iterations"] = iterations(epochs, images, batch_size)
    recipe, pixels = Recipe(**chosen), data.train.images[0].numel()
    if recipe.steps and pixels % recipe.steps:
        parser.error(f"argument --steps: must divide {pixels}, the number of pixels, got {recipe.steps}")
    return recipe


def _device(parser: Parser, args: argparse.Namespace) -> torch.device:
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda needs a GPU that torch can use, found none")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _backend(name: str | None, split: Split, recipe: Recipe) -> str:
    """Return the backend that runs the first layer in training."""
    model = build(nn.LSTM, split, recipe)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    weights = tuple(weight.detach().to(dtype) for weight in model.lstm.all_weights[0])
    x = weights[0].new_zeros(1, recipe.batch_size, model.lstm.input_size)
    layer = Layer(x, weights, (None,) * len(lstm.states), None, None, False, lstm)
    options: dict[str, Any] = {"cell": lstm, "masked": False, "inner_states": False}
    return dispatch.choose(name, split.images.device, dtype, **options, layer=layer)


if __name__ == "__main__":
    sys.exit(main())
