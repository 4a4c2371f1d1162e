"""What a report on the runtimes says: ratios, and the table of docs/runtimes.md."""

from typing import Any

from benchmarks.shared.tables import table

TITLE = "fastlstm beside other runtimes"
OURS = "fastlstm", "fastlstm's stream"
BEGIN, END = "<!-- the table of python -m benchmarks.runtimes -->\n", "<!-- its end -->\n"
CHART = """\
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="images/runtimes-dark.svg">
  <img alt="Bars: the time of the fastest other runtime of each layer, beside fastlstm" src="images/runtimes-light.svg">
</picture>
"""


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Return how many times as long as fastlstm's layer the others took."""
    return {name: seconds / row["seconds"]["fastlstm"] for name, seconds in row["seconds"].items() if name not in OURS}


def best_other(row: dict[str, Any]) -> tuple[str, float]:
    """Return the fastest of the others, and its ratio."""
    return min(ratios(row).items(), key=lambda item: item[1])


def name_of(row: dict[str, Any]) -> str:
    return f"{row['cell']} {row['mode']} {row['name'].removeprefix('GRU-')}"


def markdown(report: dict[str, Any]) -> str:
    """Return the table of a report, under a sentence on the machine and the versions."""
    about, results = report["machine"], report["results"]
    others = [name for name in dict.fromkeys(name for row in results for name in row["seconds"]) if name not in OURS]
    versions = ", ".join(f"{name} {version.partition('+')[0]}" for name, version in report["versions"].items())
    rows = []
    for row in results:
        cells = {name: f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}" for name, ratio in ratios(row).items()}
        ours = [f"{row['seconds'][name] * 1e6:.1f}" if name in row["seconds"] else "" for name in OURS]
        rows.append([name_of(row), *ours, *(cells.get(name, "") for name in others)])
    machine = f"{about['cpu']}, {about['threads']} threads, load average {about['load']} before the run"
    header = ["layer", *(f"{name}, microseconds" for name in OURS), *others]
    return "\n".join([f"{machine}, {report['date']}; {versions}.", "", *table(header, rows)]) + "\n"


def placed(page: str, report: dict[str, Any]) -> str:
    """Return a page with the chart and the table of a report between their marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n" + CHART + "\n" + markdown(report) + "\n" + END + rest.split(END)[1]
