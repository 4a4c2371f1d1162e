"""Draws the pictures of README.md and of the site's pages into docs/images, as SVG for light and dark pages.

`speed` and `runtimes` are charts of the newest results, and `layer` shows what a fused layer does. `benchmarks.pages`
calls this.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path

from benchmarks.cpu import layers
from benchmarks.cpu import runtimes as cases_of_runtimes
from benchmarks.shared.figures import Figures
from benchmarks.shared.results import newest
from benchmarks.shared.shapes import GRID

ROOT = Path(__file__).resolve().parents[1]
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
# The text upon a box in the colour of training is "on".
LIGHT = {"text": "#1f2328", "quiet": "#59636e", "training": "#4f46e5", "inference": "#a5b0fb", "on": "#ffffff"}
DARK = {"text": "#e6edf3", "quiet": "#9ea7b3", "training": "#7c83ff", "inference": "#454b8f", "on": "#0d1117"}
THEMES = {"light": LIGHT, "dark": DARK}
MODES = ("training", "inference")
LAYERS = [case for case in cases_of_runtimes.CASES if case.group == "runtimes"]
NAMES = {str(shape) for shape in GRID if shape.T > 1}
SEQUENCES = [case for case in layers.CASES if case.group == "layers" and case.name in NAMES]


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


def speed(theme: str, figures: Figures) -> Drawing:
    """Draw how many times as fast as torch.nn.LSTM the layers of the grid are, the best in training first."""
    k, shapes = figures.having(SEQUENCES)[0], {str(shape): shape for shape in GRID}
    ratios = {case: {mode: figures.ratios(k, [case], mode) for mode in MODES} for case in SEQUENCES}
    rows = [(case, {mode: of[0] for mode, of in each.items()}) for case, each in ratios.items() if all(each.values())]
    rows.sort(key=lambda row: -row[1]["training"])
    top, step, left, width, right = 84, 38, 208, 540, (34, 84, 136, 186)
    scale = (width - left - 44) / max(ratio for _, each in rows for ratio in each.values())
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
    for n, (case, each) in enumerate(rows):
        y, shape = top + step * n, shapes[case.name]
        for x, size in zip(right, (shape.T, shape.B, shape.I, shape.H)):
            drawing.text(x, y + 16, str(size), anchor="end")
        more = [f"{shape.layers} layers"] * (shape.layers > 1) + ["both directions"] * shape.bidirectional
        drawing.text(right[3], y + 29, ", ".join(more), "quiet", "end", 'font-size="11"')
        for m, mode in enumerate(MODES):
            drawing.box(left, y + 14 * m, scale * each[mode], 13, mode)
            drawing.text(left + scale * each[mode] + 6, y + 11 + 14 * m, f"{each[mode]:.2f}", style='font-size="12"')
        for _, ratio in figures.best_other(k, case, "inference"):
            drawing.line(round(left + scale * each["inference"] / ratio, 1), y + 13, y + 28)
    drawing.line(round(left + scale, 1), 76, bottom - 6)
    drawing.text(0, bottom + 20, source(figures, k), "quiet", style='font-size="12"')
    return drawing


def source(figures: Figures, k: int) -> str:
    report = figures.reports[k]
    torch = report["machine"]["versions"]["torch"].partition("+")[0]
    return f"float32, {report['machine']['cores']} cores of a {figures.name(k)}, torch {torch}, {report['date']}"


def runtimes(theme: str, figures: Figures) -> Drawing:
    """Draw how many times as fast as the fastest other runtime each layer is."""
    (k, *_), labels = figures.having(LAYERS), {"inference": "", "step": "", "training": ", training"}
    best = [
        (case.name + labels[case.modes[0]], *of) for case in LAYERS for of in figures.best_other(k, case, case.modes[0])
    ]
    top, step, left, width = 62, 22, 262, 540
    scale = (width - left - 108) / max(ratio for *_, ratio in best)
    bottom = top + step * len(best)
    drawing = Drawing(theme, width, bottom + 32, "How many times as fast as the fastest other runtime each layer is")
    title = "Times as fast as the fastest other runtime"
    drawing.text(0, 18, title, style='font-size="16" font-weight="600"')
    drawing.text(left + scale, 48, "the other = 1", "quiet", "middle")
    for n, (layer, runtime, ratio) in enumerate(best):
        y = top + step * n
        drawing.text(0, y + 13, layer, style='font-size="12"')
        drawing.box(left, y, scale * ratio, 16, "training" if ratio >= 1 else "inference")
        end = max(left + scale * ratio, left + scale)
        drawing.text(end + 6, y + 12, f"{ratio:.2f} {runtime}", style='font-size="11"')
    drawing.line(round(left + scale, 1), 54, bottom - 6)
    drawing.text(0, bottom + 20, source(figures, k), "quiet", style='font-size="12"')
    return drawing


OPERATIONS = ("x W", "+ h W + b", "σ, tanh", "new c", "new h")


def layer(theme: str, figures: Figures) -> Drawing:
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


PICTURES: dict[str, Callable[[str, Figures], Drawing]] = {"speed": speed, "runtimes": runtimes, "layer": layer}


def main() -> None:
    for name, draw in PICTURES.items():
        for theme in THEMES:
            path = ROOT / "docs/images" / f"{name}-{theme}.svg"
            path.write_text(str(draw(theme, Figures(newest()))), encoding="utf-8")


if __name__ == "__main__":
    main()
