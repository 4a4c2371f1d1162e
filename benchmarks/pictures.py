"""Draws the pictures of README.md and of the site's pages, as SVG for light and dark pages.

python -m benchmarks.pictures    # writes docs/images/speed-*.svg, runtimes-*.svg and layer-*.svg

`speed` is a chart of the newest report of `make bench` in float32, and `runtimes` one of the newest report of
`python -m benchmarks.runtimes`. `layer` shows what a fused layer does.
"""

import json
from collections.abc import Callable
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.runtimes import comparison

ROOT = Path(__file__).resolve().parents[1]
TITLE = "fastlstm against torch.nn.LSTM"  # of a report in float32, as benchmarks/run.py writes it
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
# The text upon a box in the colour of training is "on".
LIGHT = {"text": "#1f2328", "quiet": "#59636e", "training": "#4f46e5", "inference": "#a5b0fb", "on": "#ffffff"}
DARK = {"text": "#e6edf3", "quiet": "#9ea7b3", "training": "#7c83ff", "inference": "#454b8f", "on": "#0d1117"}
THEMES = {"light": LIGHT, "dark": DARK}
MODES = ("training", "inference")


class Drawing:
    """An SVG of a width and a height in pixels. Colours are names of `LIGHT` and `DARK`."""

    def __init__(self, theme: str, width: int, height: int, label: str) -> None:
        self.colours = THEMES[theme]
        size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        role = f'role="img" aria-label="{escape(label)}"'
        self.lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {role} font-family="{FONT}" font-size="13">']

    def text(self, x: float, y: float, text: str, colour: str = "text", anchor: str = "start", style: str = "") -> None:
        where = f'x="{x:g}" y="{y:g}" fill="{self.colours[colour]}" text-anchor="{anchor}"'
        self.lines.append(f"<text {where} {style}>{escape(text)}</text>".replace(" >", ">"))

    def box(self, x: float, y: float, width: float, height: float, fill: str, radius: float = 2) -> None:
        where = f'x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="{radius:g}"'
        self.lines.append(f'<rect {where} fill="{self.colours[fill]}"/>')

    def line(self, x: float, begin: float, end: float, head: float = 0) -> None:
        """Draw a vertical line, with the head of an arrow of so many pixels at its end."""
        colour, back = self.colours["text"], -head if end > begin else head
        self.lines.append(f'<path d="M{x:g} {begin:g}V{end + back:g}" stroke="{colour}" stroke-width="1.5"/>')
        if head:
            self.lines.append(f'<path d="M{x:g} {end:g}l-4 {back:g}h8z" fill="{colour}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>"]) + "\n"


def reports(title: str = TITLE) -> list[dict[str, Any]]:
    """Return the reports with this title, the oldest first."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "benchmarks/results").glob("*.json")]
    return sorted((report for report in every if report.get("title") == title), key=lambda report: report["date"])


def newest(title: str = TITLE) -> dict[str, Any]:
    """Return the newest report with this title."""
    return reports(title)[-1]


def sequences(report: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Return (shape, ratio by mode) of the report's fixed shapes of several steps, the best in training first.

    Beside the modes there is "other", the ratio of the fastest other runtime in inference, if there was one.
    """
    ratios: dict[str, dict[str, float]] = {}
    rows = [r for r in report["results"] if not r["random"] and r["shape"]["T"] > 1 and not r.get("noisy")]
    for row in rows:
        # not the row's own ratio, which in older reports is the median of the rounds' ratios
        ratio = ratios.setdefault(row["name"], {})
        ratio[row["mode"]] = row["baseline_seconds"] / row["seconds"]
        if row["rivals"]:
            ratio["other"] = ratio[row["mode"]] / min(rival["median"] for rival in row["rivals"].values())
    shapes = {row["name"]: row["shape"] for row in rows}
    both = [(shapes[name], ratio) for name, ratio in ratios.items() if all(mode in ratio for mode in MODES)]
    return sorted(both, key=lambda pair: -pair[1]["training"])


def medians(report: dict[str, Any]) -> dict[str, float]:
    """Return the median ratio of each mode over the shapes of `sequences`."""
    return {mode: median(ratio[mode] for _, ratio in sequences(report)) for mode in MODES}


def speed(theme: str) -> Drawing:
    report = newest()
    rows, machine = sequences(report), report["machine"]
    top, step, left, width, right = 84, 38, 208, 540, (34, 84, 136, 186)
    scale = (width - left - 44) / max(ratio[mode] for _, ratio in rows for mode in MODES)
    bottom = top + step * len(rows)
    drawing = Drawing(theme, width, bottom + 32, "Speed of fastlstm.LSTM relative to torch.nn.LSTM")
    drawing.text(0, 18, "fastlstm.LSTM, times as fast as torch.nn.LSTM", style='font-size="16" font-weight="600"')
    for mode, x in zip(MODES, (left, left + 90)):
        drawing.box(x, 35, 12, 12, mode)
        drawing.text(x + 18, 46, mode)
    drawing.line(left + 186, 34, 48)
    drawing.text(left + 194, 46, "fastest other runtime")
    for n, name in enumerate(("steps", "batch", "inputs", "units")):
        drawing.text(right[n], 70, name, "quiet", "end")
    drawing.text(left + scale, 70, "nn.LSTM = 1", "quiet", "middle")
    for n, (shape, ratio) in enumerate(rows):
        y = top + step * n
        for k, name in enumerate("TBIH"):
            drawing.text(right[k], y + 16, str(shape[name]), anchor="end")
        more = [f"{shape['layers']} layers"] * (shape["layers"] > 1) + ["both directions"] * shape["bidirectional"]
        drawing.text(right[3], y + 29, ", ".join(more), "quiet", "end", 'font-size="11"')
        for k, mode in enumerate(MODES):
            drawing.box(left, y + 14 * k, scale * ratio[mode], 13, mode)
            drawing.text(left + scale * ratio[mode] + 6, y + 11 + 14 * k, f"{ratio[mode]:.2f}", style='font-size="12"')
        if "other" in ratio:
            drawing.line(round(left + scale * ratio["other"], 1), y + 13, y + 28)
    drawing.line(round(left + scale, 1), 76, bottom - 6)
    cpu = machine["cpu"].replace("(R)", "").replace("(TM)", "")
    torch = machine["versions"]["torch"].partition("+")[0]
    source = f"float32, {machine['cores']} cores of an {cpu}, torch {torch}, {report['date']}"
    drawing.text(0, bottom + 20, source, "quiet", style='font-size="12"')
    return drawing


def runtimes(theme: str) -> Drawing:
    """Draw, for each layer, how many times as long as fastlstm the fastest other runtime takes."""
    report = newest(comparison.TITLE)
    best = [(comparison.name_of(row), *comparison.best_other(row)) for row in report["results"]]
    top, step, left, width = 62, 22, 262, 540
    scale = (width - left - 108) / max(ratio for *_, ratio in best)
    bottom = top + step * len(best)
    drawing = Drawing(theme, width, bottom + 32, "The fastest other runtime beside fastlstm, layer by layer")
    title = "Time of the fastest other runtime, beside fastlstm"
    drawing.text(0, 18, title, style='font-size="16" font-weight="600"')
    drawing.text(left + scale, 48, "fastlstm = 1", "quiet", "middle")
    for n, (layer, runtime, ratio) in enumerate(best):
        y = top + step * n
        drawing.text(0, y + 13, layer, style='font-size="12"')
        drawing.box(left, y, scale * ratio, 16, "training" if ratio >= 1 else "inference")
        drawing.text(
            max(left + scale * ratio, left + scale) + 6, y + 12, f"{ratio:.2f} {runtime}", style='font-size="11"'
        )
    drawing.line(round(left + scale, 1), 54, bottom - 6)
    source = f"float32, {report['machine']['cores']} cores of an {report['machine']['cpu']}, {report['date']}"
    drawing.text(0, bottom + 20, source, "quiet", style='font-size="12"')
    return drawing


OPERATIONS = ("x W", "+ h W + b", "σ, tanh", "new c", "new h")


def layer(theme: str) -> Drawing:
    drawing = Drawing(theme, 540, 372, "Separate operations beside a fused kernel")
    heading, small = 'font-size="16" font-weight="600"', 'font-size="12"'

    def memory(y: float, what: str) -> None:
        drawing.box(0, y, 540, 30, "inference", 4)
        drawing.text(12, y + 20, what)

    drawing.text(0, 18, "Separate operations: each one reads and writes memory", style=heading)
    memory(32, "memory")
    for n, name in enumerate(OPERATIONS):
        x = 110 * n
        drawing.line(x + 34, 66, 99, head=7)
        drawing.line(x + 66, 99, 65, head=7)
        drawing.box(x, 102, 100, 34, "training", 4)
        drawing.text(x + 50, 124, name, "on", "middle", 'font-weight="600"')
    drawing.text(270, 156, "and all of it again at every step", "quiet", "middle", small)

    drawing.text(0, 204, "fastlstm: one kernel runs all steps of a layer", style=heading)
    memory(218, "memory")
    drawing.line(134, 252, 285, head=7)
    drawing.text(144, 274, "x, weights", "quiet", style=small)
    drawing.line(316, 285, 251, head=7)
    drawing.text(326, 274, "h, and in training the gates", "quiet", style=small)
    drawing.box(0, 288, 540, 56, "training", 4)
    drawing.text(270, 310, "products and gates in registers, states in the cache", "on", "middle", 'font-weight="600"')
    drawing.text(270, 331, "step 1  →  step 2  →  step 3  →  …  →  step T", "on", "middle")
    drawing.text(270, 362, "the backward pass is such a kernel, too", "quiet", "middle", small)
    return drawing


PICTURES: dict[str, Callable[[str], Drawing]] = {"speed": speed, "layer": layer}
if reports(comparison.TITLE):
    PICTURES["runtimes"] = runtimes


def main() -> None:
    for name, draw in PICTURES.items():
        for theme in THEMES:
            path = ROOT / "docs/images" / f"{name}-{theme}.svg"
            path.write_text(str(draw(theme)), encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
