"""The benchmark grid, fastlstm's LSTM or GRU against torch.nn's and whatever else is installed; writes a report."""

import argparse
import datetime
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.runtimes.with_onnx import SETTLE as RIVAL_SETTLE
from benchmarks.runtimes.with_onnx import rivals
from benchmarks.shared import machine, memory
from benchmarks.shared.clock import compare
from benchmarks.shared.contest import Contest
from benchmarks.shared.report import write_report
from benchmarks.shared.shapes import GATES, GRID, MODES, Shape, random_shapes
from benchmarks.shared.tables import NOISY
from fastlstm.backends import dispatch
from fastlstm.cells import library
from fastlstm.commands import Parser, positive, whole_number

RIVAL_ROUNDS = 11
SECONDS = 60.0  # that a shape takes on two cores of a Zen 4, with its checks, its memory and other runtimes
TITLES = "fastlstm against torch.nn.{}", "torch.nn.{} against itself"
EXAMPLES = """\
examples:
  the grid and twenty random shapes
    python -m benchmarks.run
  one shape, the native backend beside the default one
    python -m benchmarks.run --only T28-B128-I28-H128 --backend native
  the error of the clock
    python -m benchmarks.run --null
"""


def measure(shape: Shape, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each mode. Results are checked before the clock starts."""
    contest = Contest(shape, options.dtype, beside=options.backend, seed=options.seed, null=options.null)
    contest.check()
    theirs, ours = contest.theirs, "fastlstm"
    used = {
        key: {} if options.null else memory.peak_memory(shape, name, options.threads, options.dtype) or {}
        for key, name in (("ours", ours), ("baseline", theirs))
    }
    for mode in MODES:
        others = machine.Others()
        runs = {name: contest.run(name, mode) for name in contest.modules}
        sides = compare(runs, options.pairs, options.threads)
        ratios = {name: side.to(sides[theirs]) for name, side in sides.items()}
        alone = {name: asdict(ratios[name]) | {"seconds": sides[name].seconds} for name in sides}
        yield {
            "name": str(shape),
            "shape": asdict(shape),
            "mode": mode,
            "random": False,
            "seconds": sides[ours].seconds,
            "threads": sides[ours].threads,
            "baseline_seconds": sides[theirs].seconds,
            "baseline_threads": sides[theirs].threads,
            "ratio": asdict(ratios[ours]),
            "noisy": ratios[ours].noisy or others.processors() > machine.BUSY,
            "backends": {name: alone[name] for name in sides if name not in (theirs, ours)},
            "gflops": shape.flops(mode) / sides[ours].seconds / 1e9,
            "peak_memory": {name: used[name].get(mode) for name in used},
            "rivals": against_rivals(contest, options.threads) if mode == "inference" else {},
        }


def against_rivals(contest: Contest, threads: int) -> dict[str, dict[str, float]]:
    """In rounds of their own: their threads would disturb the pairs with torch's layer."""
    if contest.precision != "float32":
        return {}
    others = dict(rivals(contest.modules[contest.theirs], contest.x, contest.shape, threads))
    runs = {"fastlstm": contest.run("fastlstm", "inference"), **others}
    sides = compare(runs, RIVAL_ROUNDS, threads, RIVAL_SETTLE) if others else {}
    return {name: asdict(sides["fastlstm"].to(sides[name])) | {"seconds": sides[name].seconds} for name in others}


def line(rows: list[dict[str, Any]]) -> str:
    """Return the line of a shape: its name, and how many times as fast as torch's layer each mode is."""
    texts = [f"{rows[0]['name']:28}"]
    for row in rows:
        ratio = row["ratio"]
        speed = f"{ratio['median']:5.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        others = "".join(f", {name} {of['median']:.2f}" for name, of in row["backends"].items())
        texts.append(f"{row['mode']} {NOISY if row['noisy'] else speed + others}")
    return "  ".join(texts)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m benchmarks.run", "Measure fastlstm's layer beside torch.nn's, and report.", EXAMPLES)
    named, backends = {str(shape): shape for shape in GRID}, ", ".join(dispatch.FUSED)
    add = parser.add_argument_group("shapes").add_argument
    add("--only", nargs="+", choices=named, default=[], metavar="SHAPE", help=f"of the grid: {', '.join(named)}")
    count = partial(whole_number, 0, 10**6)
    add("--random", type=count, metavar="N", help="random shapes beside the grid (20; 0 with --only)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, inputs and random shapes (0)")
    add("--cell", choices=list(GATES), default="LSTM", help="of the layers (LSTM)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of everything (float32)")
    add = parser.add_argument_group("contenders").add_argument
    several = {"nargs": "+", "choices": dispatch.FUSED, "default": [], "metavar": "NAME"}
    add("--backend", **several, help=f"backends beside auto's, of {backends}")
    add("--null", action="store_true", help="torch's layer against itself: the error of the clock")
    add = parser.add_argument_group("rounds and report").add_argument
    add("--pairs", type=positive, default=31, metavar="N", help="interleaved rounds (31)")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="as torch chooses")
    add("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR", help="folder of the report")
    options = parser.parse_args(argv)
    for name in options.backend:
        call = {"cell": library.lstm, "masked": False, "inner_states": False}
        try:
            dispatch.choose(name, torch.device("cpu"), getattr(torch, options.dtype), **call)
        except RuntimeError as error:
            parser.error(f"argument --backend: {error}")
    options.shapes = [named[name] for name in options.only] or list(GRID)
    if options.random is None:
        options.random = 0 if options.only else 20
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    every = [*options.shapes, *random_shapes(options.random, options.seed)]
    every = [replace(shape, cell=options.cell) for shape in every]
    title, date = TITLES[options.null].format(options.cell), datetime.date.today().isoformat()
    report: dict[str, Any] = {"title": title, "date": date, "machine": machine.describe(options.threads)}
    report |= {"pairs": options.pairs, "seed": options.seed}
    print(machine.header())
    minutes = max(1, round(len(every) * SECONDS / 60))
    print(f"{len(every)} shapes, some {minutes} minutes on two quiet cores; times as fast as nn.{options.cell}:")
    results = []
    for n, shape in enumerate(tqdm(every, unit="shape")):
        rows = [row | {"random": n >= len(options.shapes)} for row in measure(shape, options)]
        results += rows
        tqdm.write(line(rows))
    kinds = [options.cell] * (options.cell != "LSTM") + ["null"] * options.null
    if options.dtype != "float32":
        report["title"] += f", in {options.dtype}"
        kinds.append(options.dtype)
    report["results"] = results
    name = "-".join([machine.slug(report["machine"]["cpu"]), report["date"], *kinds])
    for path in write_report(report, options.out, name):
        print(path)


if __name__ == "__main__":
    main()
