"""How threads share the layers of the grid, and how long that is predicted to take beside the best of all splits.

python -m benchmarks.cpu.splits [--threads 1 2 4 8 16 64]

Nothing is timed. A cell of the table names teams and the members of each, and the predicted time of the kernel, at 40
multiply-adds a nanosecond. Then comes its ratio to the least time of all numbers of teams and members, each of which is
tried. A barrier of two members takes what it was measured to take. What each further member adds has only been measured
elsewhere, so that the ratio is the largest for 60 and for 200 ns. The last column adds 400 ns, as between two sockets.
A second table counts, among many more layers, those whose ratio is above 1.05.
"""

import argparse
import itertools
from collections.abc import Iterable, Iterator
from unittest.mock import patch

import torch

from benchmarks.shared.shapes import GRID, Shape
from benchmarks.shared.tables import parser, table
from fastlstm import cells
from fastlstm.backends.base import Layer
from fastlstm.backends.numba.host import thread_split
from fastlstm.backends.numba.host.panels import lanes_of, panels_of
from fastlstm.backends.numba.host.signature import Signature, signature_of
from fastlstm.commands import positive

MULTIPLY_ADDS = 40  # a nanosecond
ONE_SOCKET, TWO_SOCKETS = (60, 200), (400,)  # ns that each member adds to a barrier
MOST = 1.05
MANY = tuple(
    Shape(*sizes)
    for sizes in itertools.product(
        (1, 28, 100), (1, 3, 8, 10, 32, 100, 128, 512), (28, 256), (64, 100, 128, 256, 512, 1024)
    )
)
Split = tuple[int, int]  # threads, teams


def signature(shape: Shape, layer: int) -> Signature:
    """Return the signature of a layer of an LSTM."""
    I = shape.I if layer == 0 else shape.directions * shape.H
    x, *weights = (
        torch.empty(n, device="meta") for n in ((shape.T, shape.B, I), (4 * shape.H, I), (4 * shape.H, shape.H))
    )
    return signature_of(Layer(x, (*weights, None, None), (None, None), None, None, False, cells.lstm), (), 0)


def every_split(threads: int, s: Signature, panels: int, backward: bool) -> Iterator[tuple[int, int]]:
    """Yield all numbers of teams and members of which each one has work."""
    groups = panels_of(panels, 4) if backward else panels
    for teams in range(1, min(threads, panels_of(s.B, 2)) + 1):
        for members in range(1, min(threads // teams, groups) + 1):
            yield teams, members


def ratio(split: Split, threads: int, s: Signature, panels: int, backward: bool, barriers: Iterable[int]) -> float:
    """Return the predicted time of a split beside the least of all splits: the largest ratio for these barriers."""
    of_two, ratios = thread_split.BARRIER + 2 * thread_split.BARRIER_PER_MEMBER, []
    for ns in barriers:
        member = ns * MULTIPLY_ADDS
        with patch.multiple(thread_split, BARRIER=of_two - 2 * member, BARRIER_PER_MEMBER=member):
            time = thread_split.predicted_time(s, panels, backward)
            least = min(time(*each) for each in every_split(threads, s, panels, backward))
            ratios.append(time(split[1], split[0] // split[1]) / least)
    return max(ratios)


def layers(shapes: Iterable[Shape]) -> Iterator[tuple[str, Signature, int, bool]]:
    """Yield the name, the signature, the panels and the pass of every layer."""
    for shape in shapes:
        for layer, backward in itertools.product(range(shape.layers), (False, True)):
            s = signature(shape, layer)
            name = (
                f"{shape}{f', layer {layer + 1}' if shape.layers > 1 else ''}, {'backward' if backward else 'forward'}"
            )
            yield name, s, panels_of(s.H, lanes_of(s.dtype)), backward


def rows(counts: list[int]) -> Iterator[list[str]]:
    for name, *layer in layers(GRID):
        line = [name]
        for threads in counts:
            s, panels, backward = layer
            count, teams = split = thread_split.split_threads(threads, *layer)
            ns = thread_split.predicted_time(s, panels, backward)(teams, count // teams) / MULTIPLY_ADDS
            line.append(
                f"{teams} x {count // teams}, {ns / 1e3:.0f} us, {ratio(split, threads, *layer, ONE_SOCKET):.2f}"
            )
        yield [*line, f"{ratio(split, threads, *layer, TWO_SOCKETS):.2f}"]


def counted(counts: list[int]) -> Iterator[list[str]]:
    every = [layer for _, *layer in layers(MANY)]
    for threads in counts:
        splits = [thread_split.split_threads(threads, *layer) for layer in every]
        line = [str(threads)]
        for barriers in ((60,), (200,), TWO_SOCKETS):
            ratios = [ratio(split, threads, *layer, barriers) for split, layer in zip(splits, every)]
            line.append(f"{sum(each > MOST for each in ratios)}, at most {max(ratios):.2f}")
        yield line


def main(options: argparse.Namespace) -> None:
    counts = options.threads
    header = ["layer", *(f"{n} threads" for n in counts), f"{counts[-1]} threads, two sockets"]
    print(*table(header, rows(counts)), sep="\n")
    print(f"\nOf {2 * len(MANY)} passes those above {MOST}, and the largest ratio:\n")
    print(*table(["threads", "60 ns a member", "200 ns", "400 ns"], counted(counts)), sep="\n")


if __name__ == "__main__":
    options = parser("cpu.splits", __doc__, rounds=None, threads=False)
    options.add_argument(
        "--threads", type=positive, nargs="+", default=[1, 2, 4, 8, 16, 64], metavar="N", help="numbers"
    )
    main(options.parse_args())
