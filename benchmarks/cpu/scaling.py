"""How much faster fastlstm.LSTM is on all threads than on one, for the shapes of the grid with 16 rows and more.

python -m benchmarks.cpu.scaling [--threads 2] [--rounds 31]
"""

from collections.abc import Iterator

from benchmarks.shared.clock import compare
from benchmarks.shared.contest import Contest
from benchmarks.shared.shapes import GRID, MODES
from benchmarks.shared.tables import Options, parser, print_table


def rows(options: Options) -> Iterator[list[str]]:
    for shape in (shape for shape in GRID if shape.B >= 16):
        contest, cells = Contest(shape), []
        for mode in MODES:
            run = contest.run("fastlstm", mode)
            one, all_ = compare({"one": {1: run}, "all": {options.threads: run}}, options.rounds).values()
            cells.append(f"{one.seconds * 1e3:.2f} to {all_.ms}, {all_.to(one)}")
        yield [str(shape), *cells]


if __name__ == "__main__":
    options = parser("cpu.scaling", __doc__).parse_args()
    print_table(["shape", *(f"{mode}: 1 to {options.threads} threads" for mode in MODES)], rows(options))
