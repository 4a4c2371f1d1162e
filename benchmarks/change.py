"""What a change does to the speed: two files of `pytest benchmarks/ --benchmark-only --benchmark-json`, as Markdown.

    python -m benchmarks.change before.json after.json

Each file holds ratios to torch, taken in pairs on one machine. So both compare although the machine may have been
busier for one of them. The last visit of a row has the times of all its visits, and it alone counts. Rows that only one
file has, or that are noisy in one, are left out.
"""

import json
import statistics
from pathlib import Path

from benchmarks.shared.clock import times_as_fast
from benchmarks.shared.tables import parser, ratio_text, table

Ratio = dict[str, float]
NOISE = 0.1  # of a shared machine: smaller changes of one shape say nothing


def ratios(path: Path) -> dict[tuple[str, str], Ratio]:
    """The ratios to torch by what was measured and mode."""
    rows = [benchmark["extra_info"] for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]]
    last = {(info["name"], info["mode"]): info for info in rows if "nn.LSTM seconds" in info}
    return {key: info["ratio to nn.LSTM"] for key, info in last.items() if not info.get("noisy")}


def markdown(before: dict[tuple[str, str], Ratio], after: dict[tuple[str, str], Ratio]) -> str:
    changes = {key: times_as_fast(after[key]) / times_as_fast(before[key]) for key in after if key in before}
    if not changes:
        return "The two measurements have no shape in common."
    mean, rows = statistics.geometric_mean(changes.values()), []
    for key, change in changes.items():
        bold = f"**{change:.2f}**" if abs(change - 1) > NOISE else f"{change:.2f}"
        rows.append([*key, bold, ratio_text(before[key]), ratio_text(after[key])])
    lines = [
        f"With this change fastlstm runs at **{mean:.2f}** times the speed of before, on the geometric mean.",
        "",
        *table(["shape", "mode", "change", "speed relative to torch, before", "after"], rows),
        "",
        f"Changes of a shape within {NOISE:.0%} are the noise of a shared machine. Others are in bold.",
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parser("change", __doc__)
    arguments.add_argument("before", type=Path)
    arguments.add_argument("after", type=Path)
    options = arguments.parse_args()
    print(markdown(ratios(options.before), ratios(options.after)))


if __name__ == "__main__":
    main()
