"""Read digits with a trained row-LSTM: `python -m fastlstm.predict IMAGE...`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastlstm.commands import Parser
from fastlstm.mnist import images, report, saved
from fastlstm.mnist.data import FILES, DataError, find, read_labels
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.training import predict

DRAWN = 10  # images of a file that are drawn, at most
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


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each image, and draw how it was read; the exit code is 0, or 2 after a bad argument or file."""
    description = "Read digits from pictures or IDX files with a model that fastlstm.train wrote."
    parser = Parser("python -m fastlstm.predict", description, EXAMPLES, "%(prog)s [options] IMAGE...")
    add = parser.add_argument_group("what is read, and drawn").add_argument
    files = "PNG, JPEG or IDX file, gzipped or not, or a directory with the test images of an IDX set"
    add("images", type=Path, nargs="+", metavar="IMAGE", help=files)
    add("--model", type=Path, default=Path(saved.DIRECTORY), help="a run, or its model.pt (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help=f"draw there how up to {DRAWN} images of each file are read")
    return parser.run(argv, _run)


def _run(parser: Parser, args: argparse.Namespace) -> int:
    with parser.naming("--model", DataError):
        model, size = saved.load(args.model)
    with parser.naming("IMAGE", DataError):
        sources = [_read(path, size) for path in args.images]
    if args.out:
        if not report.can_draw():
            parser.error(f"argument --out: {report.NEEDED}")
        parser.make_directory("--out", args.out)
    drawn: list[tuple[str, Tensor]] = []
    for source, read, labels in sources:
        names = [str(source)] if len(read) == 1 else [f"{source}[{index}]" for index in range(len(read))]
        probabilities = predict(model, read).softmax(1)
        for name, row in zip(names, probabilities, strict=True):
            (best, second), (first, other) = (part[:2].tolist() for part in row.sort(descending=True))
            print(f"{name}: {first} ({100 * best:.1f} %), else {other} ({100 * second:.1f} %)")
        if labels is not None:
            right, total = (probabilities.argmax(1) == labels).sum().item(), len(labels)
            print(f"{source}: {right} of {total} read rightly ({right / total:.2%})")
        drawn += zip(names[:DRAWN], read, strict=False)
    for number, (name, image) in enumerate(drawn if args.out else [], 1):
        _draw(args.out, number, model, image, Path(name).name)
    return 0


def _draw(directory: Path, number: int, model: RowLSTM, image: Tensor, name: str) -> None:
    from fastlstm.mnist import pictures  # not above: it imports matplotlib

    title = name.encode("ascii", "backslashreplace").decode()  # no font has all characters
    plain = re.sub(r"[^\w.-]+", "-", title)[:100]  # systems limit a file's name
    report.draw(directory / f"{number}-{plain}.reading.png", pictures.reading(model, image.unsqueeze(0), [title]))


def _read(path: Path, size: tuple[int, int]) -> tuple[Path, Tensor, Tensor | None]:
    """Return the path of the images that `path` stands for, the images, and the labels that lie beside them."""
    path = find(path, FILES[2]) if path.is_dir() else path
    read = images.read(path, size)
    beside = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
    return path, read, read_labels(beside, len(read)) if beside != path and beside.exists() else None


if __name__ == "__main__":
    sys.exit(main())
