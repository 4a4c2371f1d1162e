"""Read digits with a trained row-LSTM: `python -m fastlstm.predict IMAGE...`."""

import argparse
import functools
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastlstm.commands import Parser, whole_number
from fastlstm.files import replacing
from fastlstm.mnist import images, report, saved
from fastlstm.mnist.data import FILES, DataError, read_idx
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.training import predict

INVERT = {"auto": None, "yes": True, "no": False}
LONGEST = 50  # characters of a picture's name: of four bytes each they fit a file name, whose limit is mostly 255
EXAMPLES = """\
A picture of the training images' size with light ink on a dark ground is
taken as it is. Every other is cropped to its ink, scaled and centred as
MNIST was. An IDX file whose labels lie beside it is also scored.

examples:
  train a model, and read two pictures with it
    python -m fastlstm.train
    python -m fastlstm.predict three.png photo.jpg
  draw how they are read
    python -m fastlstm.predict three.png photo.jpg --out runs/read
  score another run's model on the test images of an IDX set
    python -m fastlstm.predict DIR --model runs/best
"""


class _Source(NamedTuple):
    path: Path
    images: Tensor  # (N, rows, columns)
    labels: Tensor | None  # (N,)

    def name(self, index: int) -> str:
        return str(self.path) if len(self.images) == 1 else f"{self.path}[{index}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each image, and draw how it was read; the exit code is 0, or 2 after a bad argument or file."""
    parser = Parser(
        prog="python -m fastlstm.predict",
        description="Read digits from pictures or IDX files with a model that fastlstm.train wrote.",
        epilog=EXAMPLES,
        usage="%(prog)s [options] IMAGE...",
    )
    add = parser.add_argument_group("what is read").add_argument
    add(
        "images",
        type=Path,
        nargs="*",
        metavar="IMAGE",
        help="PNG, JPEG or IDX file, gzipped or not, or a directory with the test images of an IDX set",
    )
    add("--model", type=Path, default=saved.DIRECTORY, help="a run's directory or model.pt (default: %(default)s)")
    add("--invert", choices=INVERT, default="auto", help="dark ink on light paper (default: by the picture's border)")
    add = parser.add_argument_group("what is drawn").add_argument
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="draw there how each image is read, step by step; images of the same name get a number",
    )
    count = functools.partial(whole_number, 0, 2**31 - 1)
    add("--draw", type=count, default=10, metavar="N", help="draw only the first N of a file (default: %(default)s)")
    return parser.run(argv, _run)


def _run(parser: Parser, args: argparse.Namespace) -> int:
    try:
        model, size = saved.load(args.model)
    except DataError as error:
        parser.error(f"argument --model: {error}")
    if not args.images:
        parser.error("argument IMAGE: must be one or more pictures, IDX files or directories, got none")
    try:
        sources = [_source(path, size, INVERT[args.invert]) for path in args.images]
    except DataError as error:
        parser.error(f"argument IMAGE: {error}")
    if args.out:
        if not report.can_draw():
            parser.error(f"argument --out: {report.NEEDED}")
        parser.make_directory("--out", args.out)
    for source in sources:
        probabilities = predict(model, source.images).softmax(1)
        for index, row in enumerate(probabilities):
            (best, second), (first, other) = (part[:2].tolist() for part in row.sort(descending=True))
            print(f"{source.name(index)}: {first} ({100 * best:.1f} %), else {other} ({100 * second:.1f} %)")
        if source.labels is not None:
            right = (probabilities.argmax(1) == source.labels).sum().item()
            total = len(source.labels)
            print(f"{source.path}: {right} of {total} read rightly ({right / total:.2%})")
    if args.out:
        _draw(args.out, model, sources, args.draw)
    return 0


def _draw(directory: Path, model: RowLSTM, sources: Sequence[_Source], most: int) -> None:
    from fastlstm.mnist import pictures  # not above: it imports matplotlib

    taken: set[str] = set()
    for source in sources:
        for index in range(min(most, len(source.images))):
            title = Path(source.name(index)).name
            plain = re.sub(r"[^\w.-]+", "-", title).strip("-")[:LONGEST] or "image"
            numbered = itertools.chain([plain], (f"{plain}-{n}" for n in itertools.count(2)))
            name = next(name for name in numbered if name.casefold() not in taken)
            taken.add(name.casefold())  # some file systems hold no two names that differ in case alone
            figure = pictures.reading(model, source.images[index : index + 1], [title])
            with replacing(directory / f"{name}.reading.png") as file:
                figure.savefig(file, format="png", dpi=110)


def _source(path: Path, size: tuple[int, int], invert: bool | None) -> _Source:
    if path.is_dir():
        plain = path / FILES[2]
        path = plain if plain.exists() else plain.with_name(f"{plain.name}.gz")
    read = images.read(path, size, invert)
    beside = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    if beside == path or not beside.exists():
        return _Source(path, read, None)
    labels = torch.from_numpy(read_idx(beside, 1).astype("int64"))
    if len(labels) != len(read):
        raise DataError(
            f"{beside}: expected {len(read)} labels, one for each image of {path.name}, found {len(labels)}"
        )
    return _Source(path, read, labels)


if __name__ == "__main__":
    sys.exit(main())
