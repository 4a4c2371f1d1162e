"""The files of results: one for each machine and commit, with all rows that were measured there."""

import datetime
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.shared import machine
from benchmarks.shared.case import Row
from fastlstm.files import replacing

FOLDER = Path(__file__).parents[1] / "results"
Report = dict[str, Any]  # "machine", "commit", "date" of the newest row, and "rows"


def write(text: str, path: Path) -> Path:
    with replacing(path) as file:
        file.write(text.encode())
    return path


def write_json(report: Report, path: Path) -> Path:
    return write(json.dumps(report, indent=1) + "\n", path)


def write_rows(report: Report, path: Path) -> Path:
    """Write a report with one line a row, the rows in their order by key."""
    head = json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in report["rows"])
    return write(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n', path)


def key(row: Row) -> tuple[str, str, str]:
    return row["group"], row["name"], row["mode"]


class Results:
    """The rows of this machine, which are written anew with each row: those of this commit, and those that the newest
    report of the machine has of earlier ones, which say so.

    Args:
        folder: where the file lies, or will.
        keys: of the rows that there are cases for. Others are dropped.
    """

    def __init__(self, folder: Path, keys: Collection[tuple[str, str, str]]) -> None:
        description, self.commit = machine.describe(), machine.commit()
        self.path = folder / f"{machine.slug(description['cpu'])}-{self.commit}.json"
        of_machine = {path: r for path, r in reports(folder).items() if r["machine"]["cpu"] == description["cpu"]}
        self.older = [path for path in of_machine if path != self.path]
        self.rows = {key(row): row for report in of_machine.values() for row in report["rows"] if key(row) in keys}
        self.report: Report = {"machine": description, "commit": self.commit}

    def has(self, item: tuple[str, str, str]) -> bool:
        """Return whether this commit has a result for a row."""
        row = self.rows.get(item)
        return row is not None and row["commit"] == self.commit and not row["is_noisy"]

    def add(self, row: Row) -> None:
        """Write the file anew, and remove the machine's older ones, whose rows are in it. A row without a result does
        not take the place of this commit's result. It does of an earlier commit's, which would be of other code: pages
        then say that there is none, and the next run measures it again.
        """
        today = datetime.date.today().isoformat()
        if not (row["is_noisy"] and self.has(key(row))):
            self.rows[key(row)] = row | {"commit": self.commit, "date": today}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.report | {"date": today, "rows": list(self.rows.values())}, self.path)
        while self.older:
            self.older.pop().unlink()


def reports(folder: Path = FOLDER) -> dict[Path, Report]:
    """Return the reports by their files, the oldest first. Files of a GPU have no rows, and are left out."""
    every = {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(((p, r) for p, r in every.items() if "rows" in r), key=lambda item: item[1]["date"]))


def newest(folder: Path = FOLDER) -> list[Report]:
    """Return the newest report of each machine, the newest first."""
    of_machines = {report["machine"]["cpu"]: report for report in reports(folder).values()}
    return sorted(of_machines.values(), key=lambda report: report["date"], reverse=True)
