"""How much faster fastlstm.LSTM is on all threads than on one, for the shapes of the grid with 16 rows and more.

python -m benchmarks.cpu.scaling [--threads 2] [--rounds 31]
python -m benchmarks.cpu.scaling --asked 2 4 16 64 [--sustained]

With --asked it compares fastlstm.LSTM with torch.nn.LSTM where torch is asked for these numbers of threads, which may
be more than there are processors. With --sustained it prints means of calls that follow each other without a pause:
under a quota of time a few calls take all the delay, which medians leave out, and pauses save time for later calls.
"""

import time
from collections.abc import Iterator

from benchmarks.shared.clock import Run, compare, num_threads
from benchmarks.shared.contest import Contest
from benchmarks.shared.shapes import GRID, MODES, Shape
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm.commands import positive

ASKED = Shape(28, 1, 28, 128), Shape(28, 128, 28, 128), Shape(100, 32, 128, 256)
LIMIT = 30.0  # seconds for each figure, after which no more than the fewest rounds are taken
SUSTAINED = 1.0  # seconds of calls without a pause


def rows(options: Options) -> Iterator[list[str]]:
    for shape in (shape for shape in GRID if shape.B >= 16):
        contest, cells = Contest(shape), []
        for mode in MODES:
            run = contest.run("fastlstm", mode)
            one, all_ = compare({"one": {1: run}, "all": {options.threads: run}}, options.rounds).values()
            cells.append(f"{one.seconds * 1e3:.2f} to {all_.ms}, {all_.to(one)}")
        yield [str(shape), *cells]


def sustained(run: Run, threads: int) -> float:
    """Return the mean seconds of calls that follow each other, of a first part of which no time is taken."""
    with num_threads(threads):
        for untimed in (True, False):
            begin, calls = time.perf_counter(), 0
            while (seconds := time.perf_counter() - begin) < (SUSTAINED / 5 if untimed else SUSTAINED):
                run()
                calls += 1
    return seconds / calls


def asked(options: Options) -> Iterator[list[str]]:
    for shape in ASKED:
        contest = Contest(shape)
        for mode in MODES:
            cells = []
            for threads in options.asked:
                runs = {name: {threads: contest.run(name, mode)} for name in contest.modules}
                if options.sustained:
                    means = (sustained(run[threads], threads) for run in runs.values())
                    cells.append(" and ".join(f"{mean * 1e3:.3g} ms" for mean in means))
                    continue
                sides = compare(runs, options.rounds, limit=LIMIT)
                ours, theirs = sides["fastlstm"], sides[contest.theirs]
                cells.append(f"{ours.ms} and {theirs.ms}, {ours.to(theirs)}")
            yield [f"{shape}, {mode}", *cells]


if __name__ == "__main__":
    options = parser("cpu.scaling", __doc__)
    options.add_argument("--asked", type=positive, nargs="+", metavar="N", help="numbers of threads, beside torch")
    options.add_argument("--sustained", action="store_true", help="means of calls without a pause")
    options = options.parse_args()
    if options.asked:
        print_table(["shape", *(f"{n} threads: fastlstm and torch" for n in options.asked)], asked(options))
    else:
        print_table(["shape", *(f"{mode}: 1 to {options.threads} threads" for mode in MODES)], rows(options))
