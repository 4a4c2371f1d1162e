"""The benchmark grid, fastlstm.LSTM against torch.nn.LSTM and whatever else is installed; writes a report."""

import argparse
import datetime
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import machine, memory
from benchmarks.clock import Contender, interleaved, ratio_of, thread_counts
from benchmarks.contest import Contest
from benchmarks.peak import fma_peak
from benchmarks.report import write_report
from benchmarks.rivals import SETTLE as RIVAL_SETTLE
from benchmarks.rivals import rivals
from benchmarks.shapes import GRID, MODES, Shape, random_shapes
from fastlstm.backends import dispatch
from fastlstm.cells import library
from fastlstm.commands import Parser

RIVAL_ROUNDS = 11
EXAMPLES = """\
examples:
  the grid and twenty random shapes
    python -m benchmarks.run
  one shape, the native backend beside the default one
    python -m benchmarks.run --only T28-B128-I28-H128 --backend native
  the error of the clock
    python -m benchmarks.run --null
"""


def measure(shape: Shape, options: argparse.Namespace, peak_before: float) -> Iterator[dict[str, Any]]:
    """A row for each mode. Correctness before the clock starts, and the peak on both sides of it: the highest of these
    and `peak_before` counts, since what else runs on the machine can only lower it.
    """
    threads: int = options.threads
    dtype: torch.dtype = getattr(torch, options.dtype)
    contest = Contest(shape, options.seed, options.null, options.backend, dtype)
    contest.check()
    used: dict[str, dict[str, int]] = {"ours": {}, "baseline": {}}
    if not options.null:
        used = {name: memory.peak_memory(shape, name, threads, options.dtype) or {} for name in used}
    for mode in MODES:
        # each count in every round: chosen in a minute when two cores are worth one, it would be the wrong one
        counts = [threads] if options.null else thread_counts(threads)
        theirs = {f"baseline-{n}": Contender(contest.run(contest.baseline, mode), n) for n in counts}
        ours = Contender(contest.run(contest.ours, mode), threads)
        before = fma_peak(threads)
        named = {name: Contender(contest.run(m, mode), threads) for name, m in contest.backends.items()}
        times = interleaved({**theirs, "ours": ours, **named}, options.pairs)
        peak = max(peak_before, before, fma_peak(threads))
        seconds = {name: statistics.median(values) for name, values in times.items()}
        baseline = min(theirs, key=seconds.__getitem__)
        gflops = shape.flops(mode) / seconds["ours"] / 1e9
        others = against_rivals(contest, ours, threads) if mode == "inference" and dtype == torch.float32 else {}
        yield {
            "name": str(shape),
            "shape": asdict(shape),
            "mode": mode,
            "random": False,
            "seconds": seconds["ours"],
            "baseline_seconds": seconds[baseline],
            "baseline_threads": theirs[baseline].threads,
            "ratio": asdict(ratio_of(times[baseline], times["ours"])),
            "backends": {
                name: asdict(ratio_of(times[baseline], times[name])) | {"seconds": seconds[name]} for name in named
            },
            "gflops": gflops,
            "fma_peak": peak,
            "fraction_of_peak": gflops / peak,
            "peak_memory": {name: used[name].get(mode) for name in used},
            "rivals": others,
        }


def against_rivals(contest: Contest, ours: Contender, threads: int) -> dict[str, dict[str, float]]:
    """In rounds of their own: their threads would disturb the pairs with nn.LSTM."""
    others = dict(rivals(contest.baseline, contest.x, contest.shape, threads))
    times = interleaved({"ours": ours, **others}, RIVAL_ROUNDS, RIVAL_SETTLE) if others else {}
    return {
        name: asdict(ratio_of(times[name], times["ours"])) | {"seconds": statistics.median(times[name])}
        for name in others
    }


def line(row: dict[str, Any]) -> str:
    ratio, peak = row["ratio"], row["fraction_of_peak"] * 100
    speed = f"{ratio['median']:5.2f} times nn.LSTM ({ratio['low']:.2f} to {ratio['high']:.2f})"
    others = "".join(f", {name} {ratio['median']:5.2f} times" for name, ratio in row["backends"].items())
    return f"{row['name']:28} {row['mode']:10} {row['seconds'] * 1e3:9.3f} ms {speed}, {peak:3.0f} % of peak{others}"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("python -m benchmarks.run", "Measure fastlstm.LSTM beside torch.nn.LSTM, and report.", EXAMPLES)
    named = {str(shape): shape for shape in GRID}
    add = parser.add_argument_group("shapes").add_argument
    add("--only", nargs="+", default=[], metavar="SHAPE", help=f"of the grid: {', '.join(named)}")
    add("--random", type=int, metavar="N", help="random shapes beside the grid (20; 0 with --only)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, inputs and random shapes (0)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of everything (float32)")
    add = parser.add_argument_group("contenders").add_argument
    add(
        "--backend",
        nargs="+",
        choices=dispatch.FUSED,
        default=[],
        metavar="NAME",
        help=f"backends beside auto's, of {', '.join(dispatch.FUSED)}",
    )
    add("--null", action="store_true", help="nn.LSTM against itself: the error of the clock")
    add = parser.add_argument_group("rounds and report").add_argument
    add("--pairs", type=int, default=31, metavar="N", help="interleaved rounds (31)")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="as torch chooses")
    add("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR", help="folder of the report")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.only) - set(named))
    if unknown:
        parser.error(f"argument --only: no shape {', '.join(unknown)}; the grid has {', '.join(named)}")
    for name, least in (("pairs", 1), ("threads", 1), ("random", 0)):
        if getattr(options, name) is not None and getattr(options, name) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {getattr(options, name)}")
    for name in options.backend:
        dtype = getattr(torch, options.dtype)
        try:
            call = {"cell": library.lstm, "projected": False, "masked": False, "cells": False}
            dispatch.choose(name, torch.device("cpu"), dtype, **call)
        except RuntimeError as error:
            parser.error(f"argument --backend: {error}")
    options.shapes = [named[name] for name in options.only] or list(GRID)
    if options.random is None:
        options.random = 0 if options.only else 20
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    description = machine.describe(options.threads)
    if (description["load"] or 0) > 0.5:
        print(f"warning: load average {description['load']}: other work on this machine disturbs what is measured")
    peak = {str(n): fma_peak(n) for n in thread_counts(options.threads)}
    drawn = list(random_shapes(options.random, options.seed))
    results = []
    for n, shape in enumerate(tqdm([*options.shapes, *drawn], unit="shape")):
        for row in measure(shape, options, peak[str(options.threads)]):
            row["random"] = n >= len(options.shapes)
            results.append(row)
            tqdm.write(line(row))
    today = datetime.date.today().isoformat()
    title = "torch.nn.LSTM against itself" if options.null else "fastlstm against torch.nn.LSTM"
    report = {
        "title": title if options.dtype == "float32" else f"{title}, in {options.dtype}",
        "date": today,
        "machine": description,
        "peak": peak,
        "pairs": options.pairs,
        "seed": options.seed,
        "results": results,
    }
    name = f"{machine.slug(machine.cpu_name())}-{today}" + ("-null" if options.null else "")
    name += "" if options.dtype == "float32" else f"-{options.dtype}"
    for path in write_report(report, options.out, name):
        print(path)


if __name__ == "__main__":
    main()
