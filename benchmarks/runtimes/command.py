"""fastlstm beside every other runtime of LSTMs and GRUs that is installed, on the CPU, in float32.

python -m benchmarks.runtimes [--only fastlstm torch.nn JAX] [--rounds 5] [--threads 2]

Each contender has a process of its own, and blocks of its calls take turns with blocks of the others'. Before that,
each compares its outputs, its losses and its gradients with torch's. A contender runs on one thread or on all,
whichever was faster in a first round. JAX and Keras choose their threads themselves. `pip install .[runtimes]` installs
all of them. The command writes a report to benchmarks/results, and from it the table and the chart of docs/runtimes.md.
With --out it writes the report alone.
"""

import datetime
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

from benchmarks.runtimes.cases import Case, make
from benchmarks.runtimes.comparison import TITLE, markdown, placed
from benchmarks.runtimes.worker import RUNTIMES, installed, serve
from benchmarks.shared import machine
from benchmarks.shared.clock import in_turns, thread_counts
from benchmarks.shared.report import write_json
from benchmarks.shared.shapes import Shape
from benchmarks.shared.tables import parser

SHAPES = {
    "inference": [
        Shape(20, 1, 8, 16),
        Shape(3, 3, 46, 78, bidirectional=True),
        Shape(100, 1, 40, 128),
        Shape(50, 16, 64, 64),
        Shape(28, 128, 28, 128),
        Shape(50, 32, 80, 256, layers=2, bidirectional=True),
    ],
    "step": [Shape(1, 1, 1, 20), Shape(1, 1, 40, 128), Shape(1, 1, 128, 512)],
    "training": [Shape(50, 1, 40, 128), Shape(28, 128, 28, 128)],
}
CELLS = ("LSTM", "GRU")
BLOCK, SETTLE = 0.03, 0.08  # seconds of a block, and untimed before it: ONNX Runtime's idle threads spin on for 70 ms
ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "runtimes.md"
SPAWN = multiprocessing.get_context("spawn")


def cases() -> list[Case]:
    return [make(mode, replace(shape, cell=cell)) for cell in CELLS for mode in SHAPES for shape in SHAPES[mode]]


@contextmanager
def workers(names: list[str], every: list[Case], counts: list[int]) -> Iterator[dict[str, Connection]]:
    """Start the processes of the contenders, two at a time, and end them."""
    ends, processes = {}, []
    try:
        for name in names:
            ends[name], theirs = SPAWN.Pipe()
            processes.append(SPAWN.Process(target=serve, args=(theirs, name, every, counts), daemon=True))
            processes[-1].start()
            theirs.close()
        yield ends
        for end in ends.values():
            end.send(None)
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def ask(end: Connection, k: int, threads: int) -> float:
    """Return the median time of a call in a block."""
    time.sleep(SETTLE)
    end.send((k, threads, BLOCK))
    return statistics.median(end.recv())


def measure(names: list[str], rounds: int, threads: int) -> list[dict]:
    """Return a row for each case: what a call of each contender takes, in seconds, and on how many threads."""
    every, counts, rows = cases(), thread_counts(threads), []
    with workers(names, every, counts) as ends:
        errors = {name: end.recv() for name, end in tqdm(ends.items(), desc="runtimes compile and compare")}
        for k, case in enumerate(tqdm(every, desc="cases")):
            fastest = {}
            for name in names:
                times = {n: ask(ends[name], k, n) for n in counts if (k, n) in errors[name]}
                if times:
                    fastest[name] = min(times, key=times.__getitem__)
            samples = {name: (lambda name=name, n=n, k=k: ask(ends[name], k, n)) for name, n in fastest.items()}
            seconds = {name: statistics.median(times) for name, times in in_turns(samples, rounds, limit=60).items()}
            rows.append({"name": str(case.shape), "cell": case.shape.cell, "mode": case.mode, "seconds": seconds,
                         "threads": fastest})  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    options = parser("runtimes", __doc__, rounds=5)
    options.add_argument(
        "--only", nargs="+", choices=installed(), default=installed(), help="contenders (all installed)"
    )
    options.add_argument("--out", type=Path, default=RESULTS, help="folder of the report (benchmarks/results)")
    chosen = options.parse_args(argv)
    names = [name for name in installed() if name in chosen.only or name == "fastlstm"]
    report = {"title": TITLE, "date": datetime.date.today().isoformat(), "machine": machine.describe(chosen.threads)}
    report["versions"] = machine.versions([each for name in names for each in RUNTIMES[name].distributions])
    report |= {"rounds": chosen.rounds, "results": measure(names, chosen.rounds, chosen.threads)}
    chosen.out.mkdir(parents=True, exist_ok=True)
    name = f"runtimes-{machine.slug(report['machine']['cpu'])}-{report['date']}.json"
    print(write_json(report, chosen.out / name))
    print(markdown(report))
    if chosen.out == RESULTS:
        from benchmarks import pictures  # not above: it draws the reports that it finds

        PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), report), encoding="utf-8")
        pictures.main()
