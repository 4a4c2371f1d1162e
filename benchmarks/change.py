"""What a change does to the speed: two files of `pytest benchmarks/ --benchmark-only --benchmark-json`, as Markdown.

    python -m benchmarks.change before.json after.json

Each file holds ratios to nn.LSTM, taken in pairs on one machine. So both compare although the machine may have been
busier for one of them. Of a shape that only one of them has nothing is said.
"""

import argparse
import json
import math
from pathlib import Path

Ratio = dict[str, float]
NOISE = 0.1  # of a shared machine: smaller changes of one shape say nothing


def ratios(path: Path) -> dict[tuple[str, str], Ratio]:
    """The ratios to nn.LSTM by shape and mode."""
    found = [benchmark["extra_info"] for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]]
    return {(info["name"], info["mode"]): info["ratio to nn.LSTM"] for info in found if "nn.LSTM seconds" in info}


def text_of(ratio: Ratio) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def markdown(before: dict[tuple[str, str], Ratio], after: dict[tuple[str, str], Ratio]) -> str:
    both = [key for key in after if key in before]
    if not both:
        return "The two measurements have no shape in common."
    changes = [after[key]["median"] / before[key]["median"] for key in both]
    mean = math.exp(sum(map(math.log, changes)) / len(changes))
    lines = [
        f"With this change fastlstm runs at **{mean:.2f}** times the speed of before, on the geometric mean.",
        "",
        "| shape | mode | change | speed relative to nn.LSTM, before | after |",
        "|---|---|---|---|---|",
    ]
    for (name, mode), change in zip(both, changes):
        seen = f"**{change:.2f}**" if abs(change - 1) > NOISE else f"{change:.2f}"
        of_each = " | ".join(text_of(found[name, mode]) for found in (before, after))
        lines.append(f"| {name} | {mode} | {seen} | {of_each} |")
    lines += ["", f"Changes of a shape within {NOISE:.0%} are the noise of a shared machine. Others are in bold."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args()
    print(markdown(ratios(options.before), ratios(options.after)))


if __name__ == "__main__":
    main()
