"""How much faster fastlstm.LSTM is on all threads than on one, for the shapes of the grid with 16 rows and more.

python -m benchmarks.scaling [--threads 2] [--pairs 31]
"""

import argparse
import statistics

import torch

from benchmarks.clock import Contender, interleaved, ratio_of
from benchmarks.contest import Contest
from benchmarks.shapes import GRID, MODES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=31)
    options = parser.parse_args()
    print(f"| shape | {' | '.join(f'{mode}: 1 to {options.threads} threads' for mode in MODES)} |\n|---|---|---|")
    for shape in GRID:
        if shape.B < 16:
            continue
        contest, cells = Contest(shape), []
        for mode in MODES:
            run = contest.run(contest.ours, mode)
            times = interleaved({str(n): Contender(run, n) for n in (1, options.threads)}, options.pairs)
            one, all_ = times["1"], times[str(options.threads)]
            ratio = ratio_of(one, all_)
            cells.append(
                f"{statistics.median(one) * 1e3:.2f} to {statistics.median(all_) * 1e3:.2f} ms, "
                f"**{ratio.median:.2f}** ({ratio.low:.2f}–{ratio.high:.2f})"
            )
        print(f"| {shape} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
