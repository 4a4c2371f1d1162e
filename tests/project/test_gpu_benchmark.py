"""The GPU benchmark as far as it goes without a GPU."""

import itertools
import json
import os

import pytest
import torch

from benchmarks import test_speed
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import host, layers
from benchmarks.shared.shapes import MODES, Shape
from tests.helpers import ROOT, interpreter
from tests.helpers.stand_in import TINY, install
from tests.helpers.transforms import needs_triton


@pytest.fixture
def card(monkeypatch):
    """A device that is the CPU. Torch's default is tf32. To set it is forbidden by testing tools that tests import."""
    install(monkeypatch)
    monkeypatch.setattr(layers, "set_precision", lambda name: None)


@needs_triton
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_layer_is_timed_by_events_and_from_graphs(cell, card):
    rows = list(layers.rows((Shape(3, 2, 4, 8, cell=cell), "tf32", False), 2))
    assert [(row["way"], row["mode"]) for row in rows] == list(itertools.product(layers.WAYS, MODES))
    for row in rows:
        assert row["same_bits"]
        assert list(row["ratios"]) == [f"nn.{cell}"]
        assert row["ratios"][f"nn.{cell}"]["quartile"] == pytest.approx(
            row["seconds"][f"nn.{cell}"] / row["seconds"]["fastlstm"]
        )


@pytest.mark.parametrize("way", layers.WAYS)
def test_calls_from_the_host_begin_when_the_flush_has_ended(way, card, monkeypatch):
    events = []
    monkeypatch.setattr(layers, "WARM_UP", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("waited"))
    monkeypatch.setattr(layers, "graphed", lambda run: run)
    layers.times({"a": lambda: events.append("ran")}, way, 2)
    assert events == (["waited", "ran"] if way == "eager" else ["ran"]) * 2


def test_without_a_gpu_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "results")])
    assert "no CUDA device was found" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_every_file_of_tests_exists():
    files = {argument for command in gpu.CHECKS for argument in command if argument.startswith("tests/")}
    assert len(files) > 5
    assert all((ROOT / name).exists() for name in files)


@pytest.mark.slow
@needs_triton
def test_pytest_reports_what_was_measured(tmp_path):
    """The GPU's rows of `pytest benchmarks/`, with a stand-in for the device."""
    file = tmp_path / "times.json"
    arguments = ["-q", "-p", "tests.helpers.stand_in", "benchmarks/", "-k", "gpu", "-p", "no:cacheprovider"]
    arguments += ["--benchmark-only", f"--benchmark-json={file}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["TRITON_INTERPRET"] = "1"
    done = interpreter.run_module("pytest", *arguments, cwd=ROOT, environment=environment, check=True)
    infos = [each["extra_info"] for each in json.loads(file.read_text())["benchmarks"]]
    rows = [(info["group"], info["name"], info["mode"]) for info in infos]
    every = [("A card, bf16", f"GPU {TINY}", mode) for mode in MODES]
    visits = test_speed.VISITS * len(every)
    assert rows[:visits] == test_speed.VISITS * every
    assert set(rows[visits:]) <= set(every)  # visited once more, since their rounds scattered
    assert "geometric mean of" in done.stdout


@needs_triton
@pytest.mark.slow  # which compiles all kernels of one size
def test_the_hosts_time_is_measured_without_a_gpu():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = interpreter.run_module("benchmarks.gpu.host", "--calls", "10", cwd=ROOT, environment=environment, check=True)
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[4:]]
    assert [row[0].strip() for row in rows] == ["an empty Function", *host.LAYERS]
    for row in rows:
        assert all(0 < float(cell.split(",")[0]) <= float(cell.split(",")[1]) for cell in row[1:])
