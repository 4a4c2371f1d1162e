"""The commands' own ways: help and versions."""

import re

import pytest

import fastlstm
import fastlstm.export
import fastlstm.predict
import fastlstm.train
from benchmarks import run as benchmark

COMMANDS = {"train": fastlstm.train.main, "predict": fastlstm.predict.main, "export": fastlstm.export.main}


@pytest.mark.parametrize("main", [*COMMANDS.values(), benchmark.main], ids=[*COMMANDS, "benchmarks.run"])
def test_help_ends_with_examples(capsys, main):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups, examples = text.split("\nexamples:\n")
    headings = re.findall(r"^([a-z][a-z, ]+):$", groups, re.MULTILINE)
    assert headings[0] == "options"
    assert len(headings) > 1
    _, options = re.split(r"^options:\n", groups, flags=re.MULTILINE)
    assert options.partition("\n\n")[0].count("\n") == 1  # --help and --version; what a command does is in its groups
    assert re.search(r"^    python -m (fastlstm|benchmarks)\.", examples, re.MULTILINE)
    assert max(map(len, examples.splitlines())) <= 80


@pytest.mark.parametrize("main", COMMANDS.values(), ids=COMMANDS)
def test_version(capsys, main):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastlstm {fastlstm.__version__}\n"


def refused(main, capsys, *arguments):
    """The one line that `main` ends with."""
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    return streams.err


@pytest.mark.parametrize(
    ("backend", "message"),
    [("nonsense", "invalid choice: 'nonsense' .*"), ("native", "the native backend .*")],
    ids=["unknown", "unavailable"],
)
def test_a_backend_that_cannot_be_measured_is_one_line(monkeypatch, capsys, backend, message):
    def begun(*arguments):
        raise AssertionError("the measurement began")

    monkeypatch.setattr(benchmark.machine, "describe", begun)
    monkeypatch.setattr(benchmark.dispatch.module("native"), "supports", lambda *_: "the native backend needs a loom")
    line = refused(benchmark.main, capsys, "--backend", "numba", backend)
    assert re.fullmatch(rf"python -m benchmarks\.run: error: argument --backend: {message}\n", line)
