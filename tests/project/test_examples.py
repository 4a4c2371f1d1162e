"""The examples run, and show what they say: with small arguments by default, and as a reader runs them if slow.

What two ways of computing the same differ by is relative to the largest value of a tensor, or of values within 1. Its
bound is 1e-5 in float32, which is that of sums of a few thousand terms in `tests/helpers/tolerances.py`.
"""

import importlib.util
import re

import pytest

from tests.helpers import ROOT, script

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
BOUND = 1e-5


def example(name):
    return script(f"examples/{name}.py")


def test_the_page_lists_every_script_with_its_command():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert sorted(names) == [path.stem for path in SCRIPTS]
    assert re.findall(r"^    python examples/(\w+)\.py$", page, re.MULTILINE) == names


def test_recurrent_policy_has_the_gradients_of_a_loop():
    *_, error = example("recurrent_policy").main(updates=10)
    assert error < BOUND


@pytest.mark.slow
def test_recurrent_policy_learns_what_needs_memory():
    forgetful, length, error = example("recurrent_policy").main()
    assert length > 100 > 60 > forgetful  # of 200 steps
    assert error < BOUND


def check_streams(results, most):
    assert set(results) == {"float32", "int8"}
    assert results["float32"][2] < BOUND
    for missed, alarms, error in results.values():
        assert missed + alarms <= most
        assert error < 0.2  # of an output within 1: int8 rounds inputs and weights to 1 / 127 of the largest in a row


@pytest.mark.slow
def test_wake_tone_hears_nearly_all():
    check_streams(example("wake_tone").main(), most=6)  # of 120


def test_forecasting_has_the_results_of_packed_sequences():
    difference, errors = example("forecasting").main(updates=50, B=64)
    assert difference < BOUND
    assert errors["forecast by the LSTM"] < errors["as the last month"]


@pytest.mark.slow
def test_forecasting_is_better_than_naive():
    difference, errors = example("forecasting").main()
    assert difference < BOUND
    assert errors["forecast by the LSTM"] < min(errors["as the last month"], errors["as a year before"])


def test_characters_learns_and_writes():
    carried, _, text = example("characters").main(epochs=1, H=32, size=60_000)
    assert carried < 45  # who knows nothing chooses among 90 characters and more
    assert len(text) == 401


@pytest.mark.slow
def test_characters_gains_from_the_state_that_is_carried():
    carried, anew, _ = example("characters").main()
    assert carried < anew < 6


def test_cell_from_a_paper_learns():
    errors = example("cell_from_a_paper").main(updates=100, T=10, H=32)
    assert errors["janet"][-1] < 0.12 < 0.167 < errors["lstm"][0]


@pytest.mark.slow
def test_cell_from_a_paper_learns_over_many_steps():
    assert example("cell_from_a_paper").main()["janet"][-1] < 0.02


def test_slstm_equals_a_plain_loop():
    output, gradients, rounded = example("slstm").main(T=20, B=3, D=20)
    assert max(output, gradients) < BOUND
    assert rounded < 0.02  # of an output within 1, of weights and values of 8 bits


@pytest.mark.slow
def test_compile_and_export_without_a_compiler(monkeypatch, capsys):
    module = example("compile_and_export")
    monkeypatch.setattr(module, "compiler", lambda: None)
    assert max(module.main()) < BOUND
    assert capsys.readouterr().out.startswith("no C++ compiler: ")


@pytest.mark.slow
def test_compile_and_export(capsys):
    module = example("compile_and_export")
    assert max(module.main()) < BOUND
    assert capsys.readouterr().out.startswith("outputs" if module.compiler() else "no C++ compiler: ")


@pytest.mark.skipif(importlib.util.find_spec("silero_vad") is None, reason="needs the package silero-vad")
def test_voice_activity_keeps_its_decisions():
    for error, changed in example("voice_activity").main().values():
        assert error < 0.05  # of a probability: a weight may be off by a 254th of the largest in its row
        assert changed == 0


def test_voice_activity_says_what_it_needs(monkeypatch):
    module = example("voice_activity")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install silero-vad"):
        module.main()
