"""A case of the benchmarks: a row of a table, what builds it, and how it is compared and timed."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.shared import machine
from benchmarks.shared.calls import OURS, check
from benchmarks.shared.clock import Run, Side, compare, context_of, thread_counts
from benchmarks.shared.shapes import MODES

Runs = dict[str, Run | Mapping[int, Run]]  # by name, and by thread counts where each needs a call of its own
Row = dict[str, Any]


class Skip(Exception):
    """Raised where a case cannot run on this machine. Its message is the reason."""


def first(run: Run) -> object:
    with context_of(run):
        return run()


@dataclass(frozen=True)
class Case:
    """A row: what is compared, at which sizes.

    Attributes:
        group: the table in which it stands.
        name: what is measured, with its sizes.
        build: returns what runs in a mode, by name: `OURS`, its rivals, and other ways of ours.
        modes: in which it runs.
        needs: packages, without which the case is skipped.
        threads: of each side; without it one and all, of which the faster counts for each side.
        tolerance: how far what runs may be from the first rival's result, beside values above 1; None where `build`
            has compared the results, or where they cannot be compared.
        unlike: names of what computes something else, whose results are not compared.
        steps: time steps of a call, by which a table divides.
        is_cold: whether other data fills the caches between two calls.
        is_brief: whether `pytest benchmarks/` measures it.
        note: what a reader of the row has to know.
        others: returns the calls of other runtimes in a mode, results compared.
    """

    group: str
    name: str
    build: Callable[[str], Runs]
    modes: tuple[str, ...] = MODES
    needs: tuple[str, ...] = ()
    threads: int | None = None
    tolerance: float | None = 1e-4
    unlike: tuple[str, ...] = ()
    steps: int = 1
    is_cold: bool = False
    is_brief: bool = False
    note: str = ""
    others: Callable[[str], Runs] = lambda mode: {}

    def key(self, mode: str) -> tuple[str, str, str]:
        return self.group, self.name, mode

    def runs(self, mode: str) -> Runs:
        """Build what runs in a mode, and compare the results.

        Raises:
            Skip: where a package is missing, or the machine cannot run it.
            AssertionError: for results that differ.
        """
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise Skip(f"{', '.join(missing)} is not installed")
        torch.manual_seed(0)
        try:
            runs = self.build(mode)
        except (ImportError, OSError) as error:  # of what a package needs, such as a library built for another torch
            raise Skip(str(error)) from error
        if self.tolerance is not None:
            every = {name: list(run.values()) if isinstance(run, Mapping) else [run] for name, run in runs.items()}
            every = {name: of for name, of in every.items() if name not in self.unlike}
            results = {name: [first(run) for run in of] for name, of in every.items()}
            expected = next(of[0] for name, of in results.items() if name != OURS)
            for name, of in results.items():
                for result in of:
                    try:
                        check(result, expected, self.tolerance)
                    except AssertionError as error:
                        raise AssertionError(f"{self.group}, {self.name}, {mode}: {name}: {error}") from error
        return runs

    def sides(self, runs: Runs, rounds: int, limit: float = math.inf) -> dict[str, Side]:
        """Return the times of all that run, of which none begins a round after `limit` seconds."""
        return compare(runs, rounds, thread_counts(self.threads), limit, self.is_cold)

    def measure(self, mode: str, rounds: int, limit: float) -> Row:
        """Return the row of a mode, as the files of results have it."""
        runs = self.runs(mode) | self.others(mode)
        others = machine.Others()
        sides = self.sides(runs, rounds, limit)
        busy = others.processors()
        ratios = {name: sides[OURS].to(side) for name, side in sides.items() if name != OURS}
        first, *_ = ratios.values()
        row: Row = {"group": self.group, "name": self.name, "mode": mode}
        row |= {"seconds": {name: side.seconds / self.steps for name, side in sides.items()}}
        row |= {"threads": {name: side.threads for name, side in sides.items()}}
        row |= {"ratios": {name: asdict(ratio) for name, ratio in ratios.items()}}
        row |= {"is_noisy": first.is_noisy or busy > machine.BUSY, "busy": round(busy, 2)}
        row |= {"rounds": len(sides[OURS].times)}
        return row | ({"versions": machine.versions_of(self.needs)} if self.needs else {})
