"""The comparison with other runtimes: what is compared is one layer, and the page says what the newest report says."""

import json
from dataclasses import replace

import pytest

from benchmarks import pictures
from benchmarks.runtimes import command, comparison, worker
from benchmarks.runtimes.cases import TOLERANCE, Unsupported, make
from benchmarks.shared.shapes import Shape
from tests.helpers.pages import text_of

LAYERS = {
    "inference": [Shape(5, 3, 4, 7), Shape(4, 2, 3, 5, layers=2, bidirectional=True)],
    "step": [Shape(1, 1, 3, 5)],
    "training": [Shape(5, 3, 4, 7)],
}
KINDS = [(mode, replace(shape, cell=cell)) for mode in LAYERS for shape in LAYERS[mode] for cell in command.CELLS]


@pytest.mark.parametrize("name", worker.installed())
@pytest.mark.parametrize(("mode", "shape"), KINDS, ids=lambda value: str(value))
def test_a_contender_computes_torchs_layer(name, mode, shape):
    case = make(mode, shape)
    try:
        contender = worker.builder(name)(case, 1)
    except Unsupported:
        assert name not in ("fastlstm", "torch.nn")
        return
    assert case.error(contender.results()) <= TOLERANCE
    after = contender.results()
    changes = mode == "step"  # the state goes on
    assert (case.error(after) > TOLERANCE) == changes


REPORT = {
    "machine": {"cpu": "some processor", "threads": 2, "cores": 2, "load": 0.1},
    "date": "2026-01-02",
    "versions": {"torch": "2.13.0+cpu"},
    "results": [
        {
            "name": "GRU-T1-B1-I3-H5",
            "cell": "GRU",
            "mode": "step",
            "seconds": {"fastlstm": 2e-5, "fastlstm's stream": 1e-5, "torch.nn": 3e-5, "ncnn": 1e-5},
        }
    ],
}


def test_the_table_has_losses_in_bold():
    page = f"before\n{comparison.BEGIN}old\n{comparison.END}after\n"
    text = comparison.placed(page, REPORT)
    assert "| GRU step T1-B1-I3-H5 | 20.0 | 10.0 | 1.50 | **0.50** |" in text
    assert "old" not in text
    assert comparison.placed(text, REPORT) == text
    assert comparison.best_other(REPORT["results"][0]) == ("ncnn", 0.5)


def test_the_page_has_the_table_of_the_newest_report():
    page, reports = text_of("docs/runtimes.md"), pictures.reports(comparison.TITLE)
    wanted = comparison.placed(page, reports[-1]) if reports else page
    assert page == wanted, "run python -m benchmarks.runtimes"
    assert bool(reports) == ("No run has been recorded yet." not in page)


@pytest.mark.slow
def test_the_command_writes_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SHAPES", LAYERS)
    command.main(["--only", "torch.nn", "--rounds", "1", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert sorted((row["mode"], row["name"]) for row in report["results"]) == sorted(
        (mode, str(s)) for mode, s in KINDS
    )
    assert all({"fastlstm", "torch.nn"} <= set(row["seconds"]) for row in report["results"])
