"""The pictures of docs/tutorial.md: a digit as the LSTM reads it, with all gates, and one unit alone.

python docs/tutorial/pictures.py    # needs `pip install 'fastlstm[plots]'`; trains as the page does

The model is the page's own, since the blocks of the page run first. The pictures are written to docs/tutorial, or to a
folder that is named.
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from fastlstm.files import replacing
from fastlstm.mnist.pictures import GREY, ON_ANY_GROUND

DOCS = Path(__file__).resolve().parents[1]
ROWS = 28
OVERVIEW, SHOWN = 0, 32  # the test image of the first picture, and how many of its units are shown
ALONE, UNIT = 11, 39  # the test image of the second picture, and the unit
NAMES = {"g": "candidate", "i": "input gate", "f": "forget gate", "o": "output gate", "c": "memory", "h": "output"}
GATES, STATES = "ifo", "gch"
COLOURS = {"i": "#0072b2", "f": "#009e73", "g": "#cc79a7", "o": "#e69f00", "c": GREY, "h": "#d55e00"}


def page(iterations: int = 800) -> dict[str, Any]:
    """Run the page's blocks, and return all that they define; `iterations` replaces the page's own number."""
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    defined: dict[str, Any] = {"__name__": "tutorial"}
    exec(compile(code.replace("iterations = 800", f"iterations = {iterations}"), "tutorial.md", "exec"), defined)
    return defined


def overview(image: Tensor, read: dict[str, Tensor], chances: Tensor) -> Figure:
    """An image (28, 28) beside the gates and states (28, H) and the class probabilities (28, 10) after each row."""
    figure = Figure(figsize=(9, 7.6), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 12, height_ratios=(1, 1, 0.06))
    panels = [figure.add_subplot(grid[k // 4, k % 4 * 3 : k % 4 * 3 + 3]) for k in range(8)]
    bars = [figure.add_subplot(grid[2, k * 4 : k * 4 + 4]) for k in range(3)]
    h = np.abs(read["h"].numpy())
    units = np.argsort(-h.max(0), kind="stable")[:SHOWN]
    units = units[np.argsort(h[:, units].argmax(0), kind="stable")]
    _draw(panels[0], image.numpy(), "digit", "gray_r", (0, 1))
    for axes, name in zip(panels[1:7], NAMES, strict=True):
        colours, limits = ("Greens", (0, 1)) if name in GATES else ("RdBu_r", (-1, 1))
        _draw(axes, read[name][:, units].numpy(), f"{name}, {NAMES[name]}", colours, limits)
    _draw(panels[7], 100 * chances.numpy(), "answer", "Blues", (0, 100))
    panels[7].set_xticks(range(10))
    for axes in panels[:7]:
        axes.set_xticks([])
    for k, axes in enumerate(panels):
        axes.set(yticks=range(0, ROWS, 5), ylabel="row" if k % 4 == 0 else "")
        axes.tick_params(labelleft=k % 4 == 0)
    for bar, panel, label, ticks, extend in (
        (bars[0], panels[2], "i, f, o: shut to open", (0, 0.5, 1), "neither"),
        (bars[1], panels[5], "g, c, h", (-1, 0, 1), "both"),  # c may leave the range
        (bars[2], panels[7], "probability (%)", (0, 50, 100), "neither"),
    ):
        colours = panel.images[0]
        figure.colorbar(colours, cax=bar, label=label, ticks=ticks, extend=extend, orientation="horizontal")
    return figure


def alone(image: Tensor, read: dict[str, Tensor]) -> Figure:
    """An image (28, 28) beside the gates and states (28,) of one unit, row by row."""
    figure = Figure(figsize=(9, 5), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    _draw(panels[0], image.numpy(), "digit", "gray_r", (0, 1))
    panels[0].set(xticks=[], ylabel="row")
    for axes, names, title in ((panels[1], GATES, "gates"), (panels[2], STATES, "candidate, memory, output")):
        for name in names:
            axes.plot(read[name].numpy(), range(ROWS), ".-", color=COLOURS[name], label=name, linewidth=2)
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    panels[1].set_xlim(-0.03, 1.03)
    panels[2].axvline(0, color="0.6", linewidth=1)
    return figure


def _draw(axes: Axes, values: np.ndarray, title: str, colours: str, limits: tuple[float, float]) -> None:
    axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto", interpolation="nearest")
    axes.set_title(title)


def main(folder: Path = DOCS / "tutorial", iterations: int = 800) -> list[Path]:
    """Write both pictures into `folder`, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    defined = page(iterations)
    images, read, model = defined["test"].images, defined["gates"], defined["model"]
    first, second = read(images[OVERVIEW][None]), read(images[ALONE][None])
    chances = model.out(first["h"][0]).softmax(1).detach()
    with rc_context(ON_ANY_GROUND | {"font.size": 12}):
        figures = {
            "gates.png": overview(images[OVERVIEW], {name: value[0] for name, value in first.items()}, chances),
            "unit.png": alone(images[ALONE], {name: value[0, :, UNIT] for name, value in second.items()}),
        }
        for name, figure in figures.items():
            with replacing(folder / name) as file:
                figure.savefig(file, format="png", dpi=110)
    return [folder / name for name in figures]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
