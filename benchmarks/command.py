"""Measures fastlstm beside its rivals on the CPU: all cases of some groups, or of all."""

import argparse
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cpu.tables import CASES, GROUPS
from benchmarks.shared import machine
from benchmarks.shared.case import OURS, Case, Row, Skip
from benchmarks.shared.results import FOLDER, Results
from benchmarks.shared.tables import NOISY, ratio_text
from fastlstm.commands import Parser, positive, positive_float

ROUNDS, SECONDS = 31, 5.0
OVERHEAD = 3.0  # seconds that a row takes beside its rounds, where no run has told
EXAMPLES = """\
A run writes its rows to one file for this machine and commit, and goes on where the last one stopped. Rows in which
other processes worked, or whose rounds scattered, are measured again. `python -m benchmarks.pages` then writes the
tables and charts of the pages.

examples:
  every group
    python -m benchmarks
  two groups, of which no row begins after a minute
    python -m benchmarks layers steps --stop-after 60
  some rows of a group once more
    python -m benchmarks layers --only T28-B128 --again
  whether every case builds, gives its rivals' results and can be timed; no file is written
    python -m benchmarks --quick
"""
Item = tuple[Case, str]


def items(groups: list[str], only: list[str]) -> list[Item]:
    """Return the cases of groups with their modes; with `only` those whose name has one of these texts."""
    of_groups = [case for case in CASES if case.group in groups]
    named = [case for case in of_groups if not only or any(text in case.name for text in only)]
    return [(case, mode) for case in named for mode in case.modes]


def seconds_of(items: list[Item], results: Results, limit: float) -> float:
    """Return how long rows will take, as the last run on this machine took, or else as their limit says."""
    rows = (results.rows.get(case.key(mode), {}) for case, mode in items)
    return sum(row.get("took", limit + OVERHEAD) for row in rows)


def text_of(row: Row) -> str:
    """Return a row as a line: how many times as fast as each rival, and the microseconds of a call."""
    parts = [f"{rival} {ratio_text(ratio)}" for rival, ratio in row["ratios"].items()]
    noise = f"  [{NOISY}]" if row["is_noisy"] else ""
    ours = f"{row['seconds'][OURS] * 1e6:.1f} us"
    return f"{row['group']:12} {row['mode']:9} {row['name']}: {ours}; {', '.join(parts)}{noise}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m benchmarks", "Measure fastlstm beside its rivals on the CPU.", EXAMPLES)
    add = parser.add_argument
    add("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (all)")
    add("--only", nargs="+", default=[], metavar="TEXT", help="rows whose name has one of these texts")
    add("--list", action="store_true", help="say which rows there are and how long they take, and measure nothing")
    add("--quick", action="store_true", help="time each row for an instant, and write no file")
    add("--again", action="store_true", help="also rows that have been measured")
    add("--rounds", type=positive, default=ROUNDS, metavar="N", help=f"interleaved, at most ({ROUNDS})")
    add("--seconds", type=positive_float, default=SECONDS, help=f"after which a row begins no round ({SECONDS:g})")
    add("--stop-after", type=positive_float, default=float("inf"), metavar="SECONDS", help="begin no row later")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N", help="as torch chooses")
    add("--out", type=Path, default=FOLDER, metavar="DIR", help="folder of the file (benchmarks/results)")
    options = parser.parse_args(argv)
    unknown = [name for name in options.groups if name not in GROUPS]
    if unknown:
        parser.error(f"argument GROUP: must be of {', '.join(GROUPS)}, got {unknown[0]!r}")
    options.groups = options.groups or list(GROUPS)
    if options.quick:
        options.rounds, options.seconds = 1, 0.01
    return options


def announce(every: list[Item], left: list[Item], results: Results, limit: float) -> None:
    """Say of each group how many rows it has, how many are left, and how long these take."""
    print(machine.header())
    for group in GROUPS:
        of_group, of_left = ([item for item in each if item[0].group == group] for each in (every, left))
        if of_group:
            minutes = seconds_of(of_left, results, limit) / 60
            print(f"{group}: {len(of_group)} rows, {len(of_left)} to be measured in some {minutes:.1f} minutes")


def main(argv: list[str] | None = None) -> None:
    """Measure what the arguments say. Exits with 1 where a case failed."""
    options, begin = arguments(argv), time.perf_counter()
    torch.set_num_threads(options.threads)
    results = Results(options.out, {case.key(mode) for case in CASES for mode in case.modes})
    every = items(options.groups, options.only)
    is_anew = options.again or options.quick
    left = [(case, mode) for case, mode in every if is_anew or not results.has(case.key(mode))]
    announce(every, left, results, options.seconds)
    if options.list:
        print(*(" ".join((case.group, mode, case.name)) for case, mode in left), sep="\n")
        return
    goes_on = "" if options.quick else "; the same command goes on where it stopped"
    failures, reasons = 0, dict[str, list[str]]()
    bar = tqdm(left, unit="row", disable=None)
    for case, mode in bar:
        if time.perf_counter() - begin + seconds_of([(case, mode)], results, options.seconds) > options.stop_after:
            tqdm.write(f"stopped after {options.stop_after:g} seconds{goes_on}")
            break
        bar.set_description(case.group)
        start = time.perf_counter()
        try:
            row: dict[str, Any] = case.measure(mode, options.rounds, options.seconds)
        except Skip as reason:
            reasons.setdefault(f"{case.group}: {reason}", []).append(case.name)
            continue
        except KeyboardInterrupt:
            bar.close()
            print(f"stopped{goes_on}")
            raise SystemExit(130) from None
        except Exception:
            failures += 1
            tqdm.write(f"{case.group}, {case.name}, {mode} failed:\n{traceback.format_exc()}")
            continue
        tqdm.write(text_of(row))
        if not options.quick:
            results.add(row | {"took": round(time.perf_counter() - start, 1)})
    for reason, names in reasons.items():
        print(f"left out: {reason} ({len(names)} rows)")
    print(f"{results.path}" if not options.quick else "no file is written")
    if failures:
        raise SystemExit(f"{failures} rows failed")
