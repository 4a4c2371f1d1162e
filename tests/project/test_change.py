"""The report of what a change does to the speed."""

import json
import sys

import pytest

from benchmarks import change


def measured(*ratios, statistic="quartile"):
    """What pytest-benchmark keeps of these (shape, mode, ratio), beside a benchmark of something else."""
    infos = [
        {
            "name": name,
            "mode": mode,
            "nn.LSTM seconds": 1.0,
            "ratio to nn.LSTM": {statistic: r, "low": r, "high": 2 * r},
        }
        for name, mode, r in ratios
    ]
    return json.dumps({"benchmarks": [{"extra_info": info} for info in [*infos, {"way": "graph"}]]})


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    def main(before, after):
        files = [tmp_path / "before.json", tmp_path / "after.json"]
        for file, text in zip(files, (before, after)):
            file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["change", *map(str, files)])
        change.main()
        return capsys.readouterr().out

    return main


def test_each_shape_has_its_change(report):
    ratios = ("a", "training", 1.0), ("b", "training", 2.0), ("gone", "training", 1.0)
    before = measured(*ratios, statistic="median")  # as commits measured that came before the quartile
    text = report(before, measured(("a", "training", 1.05), ("b", "training", 4.0), ("new", "training", 1.0)))
    assert "at **1.45** times the speed" in text  # the root of 2.1
    assert "| a | training | 1.05 | 1.00 (1.00–2.00) | 1.05 (1.05–2.10) |\n" in text
    assert "| b | training | **2.00** | 2.00 (2.00–4.00) | 4.00 (4.00–8.00) |\n" in text
    assert "gone" not in text
    assert "new" not in text


def test_without_a_common_shape_nothing_is_claimed(report):
    assert report(measured(("a", "training", 1.0)), measured()) == "The two measurements have no shape in common.\n"


def test_the_last_visit_of_a_row_counts(report):
    text = report(measured(("a", "training", 9.0), ("a", "training", 1.0)), measured(("a", "training", 2.0)))
    assert "| a | training | **2.00** | 1.00 (1.00–2.00) | 2.00 (2.00–4.00) |\n" in text
