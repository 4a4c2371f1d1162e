"""A run's results as JSON, as Markdown and as a chart.

`python -m benchmarks.shared.report benchmarks/results/*.json` draws the charts of earlier runs anew.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.shared.clock import Ratio
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import NOISY, ZEROS, ratio_text, table
from fastlstm.mnist.pictures import GREY, ON_ANY_GROUND  # so that all charts of the documentation look alike

COLOURS = {"training": "#5b5ff0", "inference": "#a5b0fb"}  # near those of `benchmarks.pictures`, for any ground


def replaced(path: Path, write: Callable[[Path], object]) -> Path:
    """Written under a temporary name, then renamed: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(report: dict[str, Any], path: Path) -> Path:
    text = json.dumps(report, indent=1) + "\n"
    return replaced(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f}"


def markdown(report: dict[str, Any]) -> str:
    machine, results = report["machine"], report["results"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    rivals = sorted({name for row in results for name in row["rivals"]})
    backends = list(results[0]["backends"])
    theirs = f"nn.{results[0]['shape'].get('cell', 'LSTM')}"
    vectors, counts = machine["float32_lanes"], f"{machine['cores']} cores, {machine['threads']} threads"
    lines = [
        f"# {report['title']}",
        "",
        f"{machine['cpu']}, vectors of {vectors} float32, {counts}; {machine['system']};",
        f"{versions}; backend {machine['backend']}. {report['date']}.",
        f"Load average before the run: {machine['load'] if machine['load'] is not None else 'unknown'}.",
        "",
        f"Medians over {report['pairs']} interleaved rounds, each side on one thread or on all, whichever is faster",
        f"for it. The ratio is {theirs}'s time over fastlstm's, with its 95 % interval. A row whose rounds scatter, or",
        f'beside which other processes worked, is "{NOISY}". Memory is how far resident memory rises in a call. Other',
        "rivals are measured in rounds of their own. GFLOP/s counts every product of the formula, also those with a",
        "state of zeros, which fastlstm leaves out.",
    ]
    for mode in MODES:
        rows = []
        for row in (row for row in results if row["mode"] == mode):
            memory = row["peak_memory"]
            name = row["name"] + " (random)" * row["random"] + f" ({ZEROS})" * (row["shape"]["T"] == 1)
            of_rivals = (row["rivals"].get(name) for name in rivals * (mode == "inference"))
            rows.append(
                [
                    name,
                    NOISY if row["noisy"] else str(Ratio(**ratio_of_medians(row))),
                    f"{row['seconds'] * 1e3:.3f}",
                    *(ratio_text(row["backends"][name]) for name in backends),
                    f"{row['gflops']:.0f}",
                    f"{megabytes(memory['ours'])} / {megabytes(memory['baseline'])}",
                    f"{row['threads']} / {row['baseline_threads']}",
                    *(f"{ratio['median']:.2f}" if ratio else "–" for ratio in of_rivals),
                ]
            )
        header = ["shape", "ratio", "fastlstm, ms", *(f"ratio of {name}" for name in backends), "GFLOP/s"]
        header += [f"memory, MB, fastlstm / {theirs}", f"threads, fastlstm / {theirs}"]
        header += [f"ratio to {name}" for name in rivals * (mode == "inference")]
        title = "Inference" if mode == "inference" else "Training step (forward and backward, x without gradient)"
        lines += ["", f"## {title}", "", *table(header, rows)]
    ratios = {f"{row['name']} {row['mode']}": ratio_of_medians(row) for row in results if not row["noisy"]}
    ratios |= {f"{name} at {row['name']} {row['mode']}": row["backends"][name] for row in results for name in backends}
    slower = [name for name, ratio in ratios.items() if ratio["median"] < 0.97]
    lines += ["", f"Slower than {theirs} by more than 3 %: {', '.join(slower) or 'none'}."]
    return "\n".join(lines) + "\n"


@rc_context(ON_ANY_GROUND)
def chart(title: str, rows: list[dict[str, Any]]) -> Figure:
    """Return bars from 1 with their intervals, of rows with a "name", a "mode" and a "ratio".

    The fastest in training is on top, as in README's chart. Single steps come after all sequences.
    """
    best: dict[str, tuple[bool, bool, float]] = {}
    for row in rows:
        place = ("T1-" in row["name"], row["mode"] != "training", -row["ratio"]["median"])
        best[row["name"]] = min(place, best.get(row["name"], place))
    names = sorted(best, key=best.__getitem__)
    figure = Figure(figsize=(9, 1.6 + 0.42 * len(names)), layout="constrained")
    axes, height = figure.subplots(), 0.38
    axes.set_xscale("log", base=2)
    for n, mode in enumerate(COLOURS):
        bars = [(names.index(row["name"]) + (n - 0.5) * height, row["ratio"]) for row in rows if row["mode"] == mode]
        places, values = [place for place, _ in bars], [ratio["median"] for _, ratio in bars]
        ends = [(ratio["low"], ratio["high"]) for _, ratio in bars]
        spread = [[abs(value - end) for value, end in zip(values, each)] for each in zip(*ends)] or None
        from_1 = [value - 1 for value in values]
        look: dict[str, Any] = {"color": COLOURS[mode], "error_kw": {"elinewidth": 0.8, "ecolor": GREY}}
        axes.barh(places, from_1, height, left=1, label=mode, xerr=spread, **look)
        for place, ratio in bars:
            axes.annotate(f" {ratio['median']:.2f}", (max(1.0, ratio["high"]), place), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=9, ha="left")
    axes.tick_params(axis="y", length=0, pad=6.2 * max(map(len, names), default=0))
    axes.set_ylim(max(len(names), 1) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.xaxis.set(major_formatter="{x:g}")
    axes.set_xlabel("speed relative to torch's layer (1 = the same, more is faster), with 95 % intervals")
    notes = f";\nT1 {ZEROS}" * any("T1-" in name for name in names)
    axes.set_title(f"T time steps, B batch rows, I inputs, H hidden units{notes}", loc="left", fontsize=9)
    axes.legend(loc="center right", fontsize=9)  # where the bars are short
    figure.suptitle(title, fontsize=11)
    return figure


def chart_of(report: dict[str, Any]) -> Figure:
    """Return the chart of a report's fixed shapes."""
    machine = report["machine"]
    title = f"{report['title']}: {machine['cpu']}, {machine['threads']} threads"
    rows = [row for row in report["results"] if not row["random"] and not row.get("noisy")]
    return chart(title, [row | {"ratio": ratio_of_medians(row)} for row in rows])


def ratio_of_medians(row: dict[str, Any]) -> dict[str, float]:
    """Return the ratio of a row's medians, and its interval. In older reports the row's own ratio is the median of the
    rounds' ratios, so that the interval may have to be widened.
    """
    median, ratio = row["baseline_seconds"] / row["seconds"], row["ratio"]
    return {"median": median, "low": min(ratio["low"], median), "high": max(ratio["high"], median)}


def draw(report: dict[str, Any], path: Path) -> Path:
    return replaced(path, lambda temporary: chart_of(report).savefig(temporary, dpi=150))


def write_report(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_json(report, folder / f"{name}.json"),
        replaced(folder / f"{name}.md", lambda path: path.write_text(markdown(report), encoding="utf-8")),
        draw(report, folder / f"{name}.png"),
    ]


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        print(draw(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".png")))
