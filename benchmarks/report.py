"""A run's results as JSON, as Markdown and as a chart."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.shapes import MODES

COLOURS = {"inference": "#4c78a8", "training": "#f58518"}


def replaced(path: Path, write: Callable[[Path], object]) -> Path:
    """Written under a temporary name, then renamed: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_report(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        replaced(folder / f"{name}.json", lambda path: path.write_text(json.dumps(report, indent=1) + "\n")),
        replaced(folder / f"{name}.md", lambda path: path.write_text(markdown(report))),
        replaced(folder / f"{name}.png", lambda path: chart(report).savefig(path, dpi=150)),
    ]


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f}"


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def markdown(report: dict[str, Any]) -> str:
    machine, results = report["machine"], report["results"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    peaks = ", ".join(f"{rate:.0f} on {count}" for count, rate in report["peak"].items())
    rivals = sorted({name for row in results for name in row["rivals"]})
    backends = list(results[0]["backends"])
    vectors, counts = machine["float32_lanes"], f"{machine['cores']} cores, {machine['threads']} threads"
    lines = [
        f"# {report['title']}",
        "",
        f"{machine['cpu']}, vectors of {vectors} float32, {counts}; {machine['system']};",
        f"Python {machine['python']}, {versions}; backend {machine['backend']}. {report['date']}.",
        f"FMA peak: {peaks} thread(s), GFLOP/s; each row is held against the highest, before the run and beside it.",
        *([report["note"]] if "note" in report else []),
        f"Load average before the run: {machine['load'] if machine['load'] is not None else 'unknown'}.",
        "",
        f"Medians over {report['pairs']} interleaved rounds. The ratio is nn.LSTM's time, on one thread or on all,",
        "whichever is faster for it, over fastlstm's, with its 95 % interval. Memory is how far resident memory rises",
        "in a call. Other rivals are measured in rounds of their own. GFLOP/s counts every product of the formula,",
        "those with a state of zeros too, which fastlstm leaves out; the peak is float32's.",
    ]
    for mode in MODES:
        rows = []
        for row in results:
            if row["mode"] != mode:
                continue
            ratio, memory = row["ratio"], row["peak_memory"]
            rows.append(
                [
                    row["name"] + (" (random)" if row["random"] else ""),
                    f"{row['seconds'] * 1e3:.3f}",
                    f"**{ratio['median']:.2f}** ({ratio['low']:.2f}–{ratio['high']:.2f})",
                    *(ratio_text(row["backends"][name]) for name in backends),
                    f"{row['gflops']:.0f}",
                    f"{row['fraction_of_peak'] * 100:.0f} %",
                    f"{megabytes(memory['ours'])} / {megabytes(memory['baseline'])}",
                    str(row["baseline_threads"]),
                ]
            )
            if mode == "inference":
                rows[-1] += [
                    f"{row['rivals'][name]['median']:.2f}" if name in row["rivals"] else "–" for name in rivals
                ]
        header = ["shape", "ms", "ratio to nn.LSTM", *(f"{name}'s ratio to nn.LSTM" for name in backends)]
        header += ["GFLOP/s", "of peak", "MB / nn.LSTM's", "nn.LSTM's threads"]
        if mode == "inference":
            header += [f"ratio to {name}" for name in rivals]
        title = "Inference" if mode == "inference" else "Training step (forward and backward, x without gradient)"
        lines += ["", f"## {title}", "", *table(header, rows)]
    slower = [f"{row['name']} {row['mode']}" for row in results if row["ratio"]["median"] < 0.97]
    slower += [
        f"{name} at {row['name']} {row['mode']}"
        for row in results
        for name, ratio in row["backends"].items()
        if ratio["median"] < 0.97
    ]
    lines += ["", f"Slower than nn.LSTM by more than 3 %: {', '.join(slower) or 'none'}."]
    return "\n".join(lines) + "\n"


def bars(axes: Axes, names: list[str], rows: dict[str, list[dict[str, Any]]], value: Callable[[dict], float]) -> None:
    """Horizontal bars, one pair of modes a shape, the first shape on top."""
    height = 0.38
    for n, (mode, results) in enumerate(rows.items()):
        places = [names.index(row["name"]) + (n - 0.5) * height for row in results]
        values = [value(row) for row in results]
        axes.barh(places, values, height, color=COLOURS[mode], label=mode)
        for place, number in zip(places, values, strict=True):
            axes.annotate(f" {number:.2f}", (number, place), va="center", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


def chart(report: dict[str, Any]) -> Figure:
    results = [row for row in report["results"] if not row["random"]] or report["results"]
    names = list(dict.fromkeys(row["name"] for row in results))
    rows = {mode: [row for row in results if row["mode"] == mode] for mode in MODES}
    figure = Figure(figsize=(11, 1.6 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    bars(left, names, rows, lambda row: row["ratio"]["median"])
    left.axvline(1, color="black", linewidth=1)
    left.set_title("T time steps, B batch rows, I inputs, H hidden units", loc="left", fontsize=8)
    left.set_xlabel("speed relative to torch.nn.LSTM (1 = the same, more is faster)")
    bars(right, names, rows, lambda row: row["fraction_of_peak"])
    right.axvline(1, color="black", linewidth=1, linestyle=":")
    right.set_xlim(0, max(1.1, *(1.1 * row["fraction_of_peak"] for row in results)))
    right.set_xlabel("fraction of the machine's peak of float32 FMAs")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", fontsize=8, frameon=False, ncols=2)
    machine = report["machine"]
    figure.suptitle(f"{report['title']}: {machine['cpu']}, {machine['threads']} threads", fontsize=11)
    return figure
