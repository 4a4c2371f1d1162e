"""The project's own rules: imports point down, `import fastlstm` stays light, the text speaks of the project alone."""

import inspect
import re
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from benchmarks import run
from benchmarks.shared import machine
from benchmarks.shared.report import markdown
from benchmarks.shared.shapes import GRID, Shape, random_shapes
from fastlstm import torch_private
from tests.helpers import ROOT, interpreter

LAZY = {"numba", "llvmlite", "triton", "matplotlib", "tqdm"}


def test_imports_point_only_down(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    status = lint_imports(no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.skipif(torch_private.PUBLIC, reason="by public names torch's compiler is imported with the package")
def test_import_is_light():
    code = "import sys, torch; before = set(sys.modules); import fastlstm; print(*set(sys.modules) - before)"
    added = set(interpreter.run(code, cwd=ROOT).stdout.split())
    assert "fastlstm" in added
    heavy = LAZY & {name.partition(".")[0] for name in added}
    assert heavy == set()
    # tracing's machinery costs over a second, and brings triton where it is installed
    assert "torch._dynamo" not in added
    assert "torch.onnx" not in added  # as much again as all of this package
    demonstration = {name for name in added if name.startswith(("fastlstm.mnist", "fastlstm.train"))}
    assert demonstration == set()


def test_the_package_shows_its_public_names_alone():
    import fastlstm

    assert dir(fastlstm) == sorted(["__version__", *fastlstm.__all__])
    assert all(getattr(fastlstm, name) is not None for name in dir(fastlstm))


@pytest.mark.parametrize(
    ("function", "options"),
    [("lstm", ["weight_hr", "lengths", "reset", "reverse", "return_cells", "backend"]), ("lstm_cell", ["backend"])],
)
def test_the_arguments_of_the_functions(function, options):
    import fastlstm

    parameters = inspect.signature(getattr(fastlstm, function)).parameters
    assert list(parameters) == ["x", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh", *options]


FORBIDDEN = {
    "a path on somebody's machine": re.compile(r"(?<![\w.\-/}])/(?:home|root|work|tmp|Users|mnt)/\w"),
    "a note to oneself": re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b"),
    "a merge conflict": re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE),
    "a number in some tracker": re.compile(r"\b(?:issue|ticket) #?\d", re.IGNORECASE),
}
SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".cpp", ".h", ".c", ".json"}
FOLDERS = ("fastlstm", "tests", "benchmarks", "csrc", "docs", "examples", ".github")


def texts() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    outside = [path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name == "Makefile"]
    return sorted(path for path in inside + outside if path.is_file())


@pytest.mark.parametrize("what", FORBIDDEN)
def test_text_speaks_of_the_project_alone(what):
    assert len(texts()) > 20
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}"
        for path in texts()
        for match in FORBIDDEN[what].finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"{what}: {found}"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("a path on somebody's machine", "see /" + "home/ann/x.py"),
        ("a note to oneself", "# TO" + "DO: later"),
        ("a merge conflict", "<" * 7 + " HEAD"),
        ("a number in some tracker", "as in Issue" + " 12"),
    ],
)
def test_forbidden_text_is_found(what, text):
    assert FORBIDDEN[what].search(text)


def test_flops():
    row_lstm = Shape(28, 128, 28, 128)
    step = 2 * 28 * 128 * 4 * 128
    assert row_lstm.flops("inference") == step * (28 + 128)
    assert row_lstm.flops("training") == step * (2 * (28 + 128) + 128)
    both, stacked = Shape(28, 128, 28, 128, bidirectional=True), Shape(28, 128, 28, 128, layers=2)
    assert both.flops("training") == 2 * row_lstm.flops("training")
    assert stacked.flops("training") == row_lstm.flops("training") + step * 3 * (128 + 128)  # layer 2 owes a dx


def test_random_shapes_depend_on_the_seed_alone():
    drawn = list(random_shapes(20, seed=3))
    assert drawn == list(random_shapes(20, seed=3))
    assert drawn != list(random_shapes(20, seed=4))
    assert len(set(drawn) - set(GRID)) == 20


@pytest.mark.parametrize("T", [1, 2])  # one step from a state of zeros has gradients that are zero
def test_backends_of_ones_choice_are_measured_beside_the_default(monkeypatch, T):
    monkeypatch.setattr(run.memory, "peak_memory", lambda *_: None)
    options = run.arguments(["--backend", "reference", "--pairs", "1", "--threads", "1"])
    rows = list(run.measure(Shape(T, 2, 3, 4), options))
    assert [row["mode"] for row in rows] == ["inference", "training"]
    for row in rows:
        assert list(row["backends"]) == ["reference"]
        assert row["backends"]["reference"]["seconds"] > 0
        assert "reference" in run.line(row | {"noisy": False})
        assert "reference" in markdown({**REPORT, "results": [row]})


def test_the_benchmarks_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run.arguments(["--help"])
    assert stop.value.code == 0
    assert "--pairs" in capsys.readouterr().out


REPORT = {"title": "A title", "date": "today", "pairs": 1, "machine": machine.describe(1)}
