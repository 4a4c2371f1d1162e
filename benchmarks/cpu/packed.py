"""Rows of different lengths: torch's layer with packed sequences beside ours, with packed sequences and with `lengths`.

python -m benchmarks.cpu.packed [--rounds 15] [--seconds 10]

The lengths go evenly from 1 to T and are not sorted. Each side gets a padded input and gives a padded output: "packed"
is pack_padded_sequence, the layer and pad_packed_sequence. A step of training is forward and backward. Two layers with
T from 10 to 1000 are a case in which users of PyTorch found packed sequences slow (docs/models.md names their report).
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlstm
from benchmarks.shared.calls import called, check
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES, Shape
from benchmarks.shared.tables import Options, parser, print_table

SHAPES = (
    *(Shape(T, 32, 64, 64, layers=2) for T in (10, 100, 1000)),
    Shape(100, 32, 64, 64, layers=2, cell="GRU"),
    Shape(200, 8, 64, 128, layers=2),
    Shape(50, 32, 100, 128, bidirectional=True),
    Shape(28, 128, 28, 128),
    Shape(100, 64, 256, 256),
)
TOLERANCE = 1e-4  # float32, gradients that are sums over up to 16 000 steps of rows


def packed(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    output, _ = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(output)[0]


def runs_of(shape: Shape, mode: str) -> dict[str, Run]:
    torch.manual_seed(0)
    sizes = {"num_layers": shape.layers, "bidirectional": shape.bidirectional}
    theirs, ours = (getattr(of, shape.cell)(shape.I, shape.H, **sizes) for of in (nn, fastlstm))
    ours.load_state_dict(theirs.state_dict())
    x, lengths = torch.randn(shape.T, shape.B, shape.I), torch.linspace(1, shape.T, shape.B).round().long()
    return {
        "theirs": called(mode, lambda: packed(theirs, x, lengths), theirs.parameters()),
        "ours": called(mode, lambda: packed(ours, x, lengths), ours.parameters()),
        "lengths": called(mode, lambda: ours(x, lengths=lengths)[0], ours.parameters()),
    }


def rows(options: Options) -> Iterator[list[str]]:
    for shape, mode in itertools.product(SHAPES, MODES):
        runs = runs_of(shape, mode)
        for name in ("ours", "lengths"):
            check(runs[name](), runs["theirs"](), TOLERANCE)
        theirs, *others = compare(runs, options.rounds, options.threads, limit=options.seconds).values()
        yield [str(shape), mode, theirs.ms, *(text for side in others for text in (side.ms, str(side.to(theirs))))]


if __name__ == "__main__":
    arguments = parser("cpu.packed", __doc__, rounds=15)
    arguments.add_argument("--seconds", type=float, default=10, help="after which a row begins no further round (10)")
    header = ["layer", "call", "torch's, packed", "ours, packed", "ratio", "ours with lengths", "ratio"]
    print_table(header, rows(arguments.parse_args()))
