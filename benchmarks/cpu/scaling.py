"""How much faster fastlstm.LSTM is on all threads than on one, for the shapes of the grid with 16 rows and more.

python -m benchmarks.cpu.scaling [--threads 2] [--rounds 31]
"""

from collections.abc import Iterator

from benchmarks.shared.clock import Contender, Side, interleaved
from benchmarks.shared.contest import Contest
from benchmarks.shared.shapes import GRID, MODES
from benchmarks.shared.tables import parser, print_table


def main() -> None:
    options = parser("cpu.scaling", __doc__).parse_args()

    def rows() -> Iterator[list[str]]:
        for shape in (shape for shape in GRID if shape.B >= 16):
            contest, cells = Contest(shape), []
            for mode in MODES:
                run = contest.run("fastlstm", mode)
                times = interleaved({str(n): Contender(run, n) for n in (1, options.threads)}, options.rounds)
                one, all_ = (Side(times[str(n)], n) for n in (1, options.threads))
                cells.append(f"{one.seconds * 1e3:.2f} to {all_.ms}, {all_.to(one)}")
            yield [str(shape), *cells]

    print_table(["shape", *(f"{mode}: 1 to {options.threads} threads" for mode in MODES)], rows())


if __name__ == "__main__":
    main()
