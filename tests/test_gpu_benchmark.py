"""The GPU benchmark as far as it goes without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_layers
from benchmarks.gpu import lines
from benchmarks.gpu_layers import TINY, Bench
from tests.transforms import needs_triton


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )


def test_help():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_dry_run_outside_the_interpreter_is_refused():
    done = run("--dry-run", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "argument --dry-run: needs TRITON_INTERPRET=1 in the environment" in done.stderr


@needs_triton
def test_dry_run_writes_one_file_and_one_chart(tmp_path):
    done = run("--dry-run", "--rounds", "1", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-dry-run.json", "gpu-dry-run.png"]
    results = json.loads((tmp_path / "gpu-dry-run.json").read_text())["results"]
    assert len(results) == 8  # two shapes, two precisions, two modes
    assert all(row["seconds"]["fastlstm"] > 0 for row in results)


CHILD = """
import json, os, sys, time
for item in sys.argv[1:]:
    print(json.dumps({"item": item, "began": True}), flush=True)
    if item == "crashes":
        os.abort()
    if item == "hangs":
        time.sleep(600)
    print("a library says something")
    print(json.dumps({"item": item, "row": {}}), flush=True)
"""


def test_what_crashes_or_hangs_loses_no_other_result(capsys):
    items = ["first", "crashes", "second", "hangs", "third"]
    found = list(lines([sys.executable, "-c", CHILD], items, time.monotonic() + 600, stall=3.0))
    assert [line["item"] for line in found if "row" in line] == ["first", "second", "third"]
    assert [line["item"] for line in found if "ended" in line] == ["crashes", "hangs"]
    assert "a library says something" in capsys.readouterr().out


def test_what_the_time_does_not_reach_is_named():
    found = list(lines([sys.executable, "-c", CHILD], ["first", "hangs", "second"], time.monotonic() + 3))
    assert [line["item"] for line in found if "row" in line] == ["first"]
    assert [line["item"] for line in found if "not_reached" in line] == ["hangs", "second"]


def test_a_process_that_cannot_start_is_not_tried_for_every_item():
    found = list(lines([sys.executable, "-c", "raise SystemExit(4)"], ["first", "second"], time.monotonic() + 600))
    assert found == [{"item": "first", "ended": 4}]


ROWS = """
import json, os, sys
for item in sys.argv[3:]:
    number, precision, _ = item.split(":")
    print(json.dumps({"item": item, "began": True}), flush=True)
    if number == "3":
        os.abort()
    for mode in ("inference", "training"):
        row = {"name": number, "precision": precision, "mode": mode, "way": "graph", "microseconds_a_step": 1.0}
        print(json.dumps({"item": item, "row": {**row, "ratios": {"nn.LSTM": {"median": 1.0}}}}), flush=True)
"""


def test_a_command_is_stopped_at_its_limit():
    code = "import time; print('begun', flush=True); time.sleep(600)"
    found = gpu.run([sys.executable, "-c", code], 3.0)
    assert found["status"] is None
    assert found["output"] == "begun\n"
    assert gpu.run([sys.executable, "-c", "raise SystemExit(2)"], 60.0)["status"] == 2


def test_what_a_gpu_would_run_is_all_reported(tmp_path, monkeypatch):
    """Where a shape takes its process down and a command fails."""
    commands = []

    def command(arguments, limit):
        commands.append(arguments)
        return {"command": " ".join(arguments[1:4]), "status": int("fastlstm.train" in arguments)}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(gpu, "run", command)
    monkeypatch.setattr(gpu, "LAYERS", [sys.executable, "-c", ROWS])
    with pytest.raises(SystemExit, match=r"failed: .*, -m fastlstm.train --device; what they said"):
        gpu.main(["--out", str(tmp_path)])
    written, picture = sorted(tmp_path.iterdir())
    assert (written.suffix, picture.suffix) == (".json", ".png")
    report = json.loads(written.read_text())
    assert report["device"] == "A card"
    assert {(row["name"], row["precision"]) for row in report["results"]} == {
        (str(n), precision) for n in (0, 1, 2, 4, 5, 6, 7) for precision in gpu_layers.PRECISIONS
    }
    assert sum("pytest" in arguments for arguments in commands) == 2
    assert sum("compute-sanitizer" in arguments[0] for arguments in commands) == 2


class Wrong(torch.nn.LSTM):
    def forward(self, *args):
        output, states = super().forward(*args)
        return output * 1.1, states


@pytest.fixture
def torch_flags_stay(monkeypatch):
    """In a process of its own the benchmark sets them; torch's testing tools, which other tests import, forbid it."""
    monkeypatch.setattr(gpu_layers, "set_precision", lambda name: gpu_layers.PRECISIONS[name][0])


@needs_triton
def test_rivals_are_checked_and_left_out_one_by_one(monkeypatch, torch_flags_stay):
    """Without a device: one that computes something else, and one that no graph can hold."""
    bench = Bench(TINY[0], "tf32", "cpu", [])  # torch's default
    for name, kind in (("wrong", Wrong), ("ungraphed", torch.nn.LSTM)):
        bench.modules[name] = kind(4, 8)
        bench.modules[name].load_state_dict(bench.modules["nn.LSTM"].state_dict())
    bench.check()
    assert list(bench.modules) == ["nn.LSTM", "fastlstm", "ungraphed"]
    assert "AssertionError: wrong is " in bench.left_out["wrong"]

    def graphed(run):
        graphed.calls += 1
        if graphed.calls % 3 == 0:
            raise RuntimeError("it waits")
        return run

    graphed.calls, times = 0, gpu_layers.interleaved
    monkeypatch.setattr(gpu_layers, "graphed", graphed)
    monkeypatch.setattr(gpu_layers, "interleaved", lambda runs, rounds, device: times(runs, rounds, "cpu"))
    bench.device = "cuda"
    rows = list(bench.rows(1))
    ways = [(row["mode"], row["way"], list(row["seconds"])) for row in rows]
    usual = ["nn.LSTM", "fastlstm"]
    assert ways[:2] == [("inference", "eager", [*usual, "ungraphed"]), ("inference", "graph", usual)]
    assert [row["mode"] for row in rows[2:]] == ["training", "training"]
    assert bench.left_out["ungraphed training from a graph"] == "RuntimeError: it waits"


def test_rivals_that_are_not_installed_say_so(monkeypatch, torch_flags_stay):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bench = Bench(TINY[0], "bf16", "cpu", ["torchrl"])
    assert bench.left_out == {"torchrl": "the package torchrl is not installed"}
