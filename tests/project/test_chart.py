"""The chart of a benchmark's report."""

import itertools
import json

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from benchmarks.shared.report import chart_of
from tests.helpers import ROOT

REPORTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_bars_are_sorted_and_no_text_lies_on_another(path):
    report = json.loads(path.read_text(encoding="utf-8"))
    figure = chart_of(report)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    shapes = [label.get_text() for label in axes.get_yticklabels()]
    best = dict.fromkeys(shapes, 0.0)
    for row in report["results"]:
        if row["name"] in best:
            best[row["name"]] = max(best[row["name"]], row["baseline_seconds"] / row["seconds"])
    assert list(best.values()) == sorted(best.values(), reverse=True)
    texts = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() and artist.get_visible())
    outside = axes.get_xticklabels()  # some of which are not drawn
    boxes = [text.get_window_extent() for text in texts if text not in outside]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    assert all(figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1) for box in boxes)
