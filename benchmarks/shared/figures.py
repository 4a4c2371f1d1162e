"""What the newest results of each machine say of cases."""

import re
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.runtimes.worker import RUNTIMES
from benchmarks.shared.case import Case, Row
from benchmarks.shared.clock import times_as_fast
from benchmarks.shared.results import Report, key

OTHERS = tuple(name for name in RUNTIMES if "int8" not in name)


def named(cases: Iterable[Case], *texts: str) -> list[Case]:
    """Return the cases whose name has one of these texts."""
    return [case for case in cases if any(text in case.name for text in texts)]


def short(cpu: str) -> str:
    """Return the name of a processor's generation, as a head of a column."""
    zen = re.search(r"znver(\d)", cpu)
    plain = re.sub(r"\((R|TM)\)", "", cpu)
    return f"Zen {zen[1]}" if zen else "Xeon" if plain.startswith("Intel Xeon") else plain


class Figures:
    """The rows of the newest report of each machine, the newest machine first, and which of them have been used."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = reports
        self.rows = [{key(row): row for row in report["rows"]} for report in reports]
        self.used: dict[int, set[tuple[str, str]]] = {}  # date and commit, by the number of a report

    def name(self, k: int) -> str:
        return short(self.reports[k]["machine"]["cpu"])

    def having(self, cases: Iterable[Case]) -> list[int]:
        """Return the numbers of the reports that have rows of these cases."""
        keys = {case.key(mode) for case in cases for mode in case.modes}
        return [k for k, rows in enumerate(self.rows) if keys & rows.keys()]

    def row(self, k: int, case: Case, mode: str) -> Row | None:
        row = self.rows[k].get(case.key(mode))
        if row is not None:
            self.used.setdefault(k, set()).add((row["date"], row["commit"]))
        return row

    def ratios(self, k: int, cases: Iterable[Case], mode: str, rival: str = "torch") -> list[float]:
        """Return how many times as fast as a rival ours is, of the cases that have a result."""
        rows = [row for case in cases if (row := self.row(k, case, mode)) and not row["is_noisy"]]
        return [times_as_fast(row["ratios"][rival]) for row in rows if rival in row["ratios"]]

    def gain(self, case: Case) -> float:
        """Return how many times as fast as torch's a case is in inference, but negative, for sorting."""
        return -max((ratio for k in self.having([case]) for ratio in self.ratios(k, [case], "inference")), default=0)

    def best_other(self, k: int, case: Case, mode: str) -> Iterator[tuple[str, float]]:
        """Yield the fastest other runtime, and how many times as fast as it ours is, if there is a result."""
        row = self.row(k, case, mode)
        if row is None or row["is_noisy"]:
            return
        others = {name: times_as_fast(row["ratios"][name]) for name in OTHERS if name in row["ratios"]}
        if others:
            yield min(others.items(), key=lambda item: item[1])
