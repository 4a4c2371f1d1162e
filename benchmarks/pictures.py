"""Draws charts of the newest results into docs/images, as SVG for light and dark pages.

`benchmarks.pages` calls this. The picture `layer` there shows no figures, and is its own source.
"""

from collections.abc import Callable
from html import escape
from itertools import count
from pathlib import Path

from benchmarks.cpu import layers
from benchmarks.cpu import runtimes as cases_of_runtimes
from benchmarks.shared.figures import Figures
from benchmarks.shared.results import newest
from benchmarks.shared.shapes import GRID

ROOT = Path(__file__).resolve().parents[1]
FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
LIGHT = {"text": "#1f2328", "quiet": "#59636e", "training": "#4f46e5", "inference": "#a5b0fb"}
DARK = {"text": "#e6edf3", "quiet": "#9ea7b3", "training": "#7c83ff", "inference": "#454b8f"}
THEMES = {"light": LIGHT, "dark": DARK}
MODES = ("training", "inference")
LAYERS = [case for case in cases_of_runtimes.CASES if case.group == "runtimes"]
NAMES = {str(shape) for shape in GRID if shape.T > 1}
SEQUENCES = [case for case in layers.CASES if case.group == "layers" and case.name in NAMES]


class Chart:
    """An SVG of bars, as wide as a page: rows of them from `top` on, each `step` high, beside a line at 1.

    Args:
        theme: a name of `THEMES`, whose colours have names.
        left: where bars begin, in pixels.
        room: beside the longest bar, for its figure.
        ratios: the lengths of all bars.
    """

    WIDTH = 540

    def __init__(
        self, theme: str, label: str, title: str, size: tuple[int, int, int], left: int, room: int, ratios: list[float]
    ) -> None:
        self.top, self.step, rows = size
        self.colours, self.left, self.bottom = THEMES[theme], left, self.top + self.step * rows
        self.scale, height = (self.WIDTH - left - room) / max(ratios), self.bottom + 32
        shape = f'width="{self.WIDTH}" height="{height}" viewBox="0 0 {self.WIDTH} {height}"'
        role = f'role="img" aria-label="{escape(label)}"'
        self.lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {shape} {role} font-family="{FONT}" font-size="13">']
        self.text(0, 18, title, style='font-size="16" font-weight="600"')

    def text(self, x: float, y: float, text: str, colour: str = "text", anchor: str = "start", style: str = "") -> None:
        where = f'x="{x:g}" y="{y:g}" fill="{self.colours[colour]}" text-anchor="{anchor}"'
        self.lines.append(f"<text {where} {style}>{escape(text)}</text>".replace(" >", ">"))

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        where = f'x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="2"'
        self.lines.append(f'<rect {where} fill="{self.colours[fill]}"/>')

    def line(self, x: float, begin: float, end: float) -> None:
        self.lines.append(f'<path d="M{x:g} {begin:g}V{end:g}" stroke="{self.colours["text"]}" stroke-width="1.5"/>')

    def end(self, figures: Figures, k: int) -> str:
        """Draw the line at 1 and where the figures come from, and return the SVG."""
        report = figures.reports[k]
        torch = report["machine"]["versions"]["torch"].partition("+")[0]
        source = f"float32, {report['machine']['cores']} cores of a {figures.name(k)}, torch {torch}, {report['date']}"
        self.line(round(self.left + self.scale, 1), self.top - 8, self.bottom - 6)
        self.text(0, self.bottom + 20, source, "quiet", style='font-size="12"')
        return "\n".join([*self.lines, "</svg>"]) + "\n"


def speed(theme: str, figures: Figures) -> str:
    """Draw how many times as fast as torch.nn.LSTM the layers of the grid are, the best in training first."""
    k, shapes = figures.having(SEQUENCES)[0], {str(shape): shape for shape in GRID}
    ratios = {case: {mode: figures.ratios(k, [case], mode) for mode in MODES} for case in SEQUENCES}
    rows = [(case, {mode: of[0] for mode, of in each.items()}) for case, each in ratios.items() if all(each.values())]
    rows.sort(key=lambda row: -row[1]["training"])
    label, title = "Speed of fastlstm.LSTM relative to torch.nn.LSTM", "fastlstm.LSTM, times as fast as torch.nn.LSTM"
    every, left, right = [ratio for _, each in rows for ratio in each.values()], 208, (34, 84, 136, 186)
    chart = Chart(theme, label, title, (84, 38, len(rows)), left, 44, every)
    for mode, x in zip(MODES, (left, left + 90)):
        chart.box(x, 35, 12, 12, mode)
        chart.text(x + 18, 46, mode)
    chart.line(left + 186, 34, 48)
    chart.text(left + 194, 46, "fastest other runtime")
    for x, name in zip(right, ("steps", "batch", "inputs", "units")):
        chart.text(x, 70, name, "quiet", "end")
    chart.text(left + chart.scale, 70, "nn.LSTM = 1", "quiet", "middle")
    for y, (case, each) in zip(count(chart.top, chart.step), rows):
        shape = shapes[case.name]
        for x, size in zip(right, (shape.T, shape.B, shape.I, shape.H)):
            chart.text(x, y + 16, str(size), anchor="end")
        more = [f"{shape.layers} layers"] * (shape.layers > 1) + ["both directions"] * shape.bidirectional
        chart.text(right[3], y + 29, ", ".join(more), "quiet", "end", 'font-size="11"')
        for below, mode in zip((y, y + 14), MODES):
            chart.box(left, below, chart.scale * each[mode], 13, mode)
            end = left + chart.scale * each[mode]
            chart.text(end + 6, below + 11, f"{each[mode]:.2f}", style='font-size="12"')
        for _, ratio in figures.best_other(k, case, "inference"):
            chart.line(round(left + chart.scale * each["inference"] / ratio, 1), y + 13, y + 28)
    return chart.end(figures, k)


def runtimes(theme: str, figures: Figures) -> str:
    """Draw how many times as fast as the fastest other runtime each layer is."""
    (k, *_), labels = figures.having(LAYERS), {"inference": "", "step": "", "training": ", training"}
    best = [
        (case.name + labels[case.modes[0]], *of) for case in LAYERS for of in figures.best_other(k, case, case.modes[0])
    ]
    label, title = "How many times as fast as the fastest other runtime each layer is", "Times as fast as the fastest"
    left, every = 262, [ratio for *_, ratio in best]
    chart = Chart(theme, label, f"{title} other runtime", (62, 22, len(best)), left, 108, every)
    chart.text(left + chart.scale, 48, "the other = 1", "quiet", "middle")
    for y, (layer, runtime, ratio) in zip(count(chart.top, chart.step), best):
        chart.text(0, y + 13, layer, style='font-size="12"')
        chart.box(left, y, chart.scale * ratio, 16, "training" if ratio >= 1 else "inference")
        end = left + chart.scale * max(ratio, 1)
        chart.text(end + 6, y + 12, f"{ratio:.2f} {runtime}", style='font-size="11"')
    return chart.end(figures, k)


PICTURES: dict[str, Callable[[str, Figures], str]] = {"speed": speed, "runtimes": runtimes}


def main() -> None:
    for name, draw in PICTURES.items():
        for theme in THEMES:
            path = ROOT / "docs/images" / f"{name}-{theme}.svg"
            path.write_text(draw(theme, Figures(newest())), encoding="utf-8")


if __name__ == "__main__":
    main()
