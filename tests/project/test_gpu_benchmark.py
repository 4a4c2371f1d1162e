"""The GPU benchmark as far as it goes without a GPU."""

import json
import os
import sys
import time

import pytest
import torch

from benchmarks import gpu, gpu_layers
from benchmarks.gpu import lines
from tests.helpers import ROOT, interpreter
from tests.helpers.transforms import needs_triton


@needs_triton
def test_a_gru_is_compared_with_torchs():
    """In a process of its own, since the benchmark sets the precision of torch's products for good."""
    code = """
        from benchmarks import gpu_layers
        bench = gpu_layers.Bench(gpu_layers.GRUShape(3, 2, 4, 8), "ieee", "cpu", [])
        bench.check()
        assert bench.same_bits
        assert [*bench.modules] == ["nn.GRU", "fastlstm"]
        assert [row["name"] for row in bench.rows(1)] == ["GRU-T3-B2-I4-H8"] * 2
    """
    done = interpreter.run(code, cwd=ROOT, environment={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


def run(*arguments, **environment):
    return interpreter.run_module("benchmarks.gpu", *arguments, cwd=ROOT, environment={**os.environ, **environment})


def test_help():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_it_needs_no_numba():
    code = "import sys, benchmarks.gpu; sys.exit(not {'numba', 'llvmlite'}.isdisjoint(sys.modules))"
    assert interpreter.run(code, cwd=ROOT).returncode == 0


def test_dry_run_outside_the_interpreter_is_refused():
    done = run("--dry-run", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "argument --dry-run: needs TRITON_INTERPRET=1 in the environment" in done.stderr


@pytest.mark.slow
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
    if item == "spoils":
        sys.exit(5)
"""


def test_what_crashes_or_hangs_loses_no_other_result(capsys):
    items = ["first", "crashes", "second", "hangs", "third"]
    found = list(lines([sys.executable, "-c", CHILD], items, time.monotonic() + 600, stall=2.0))
    assert [line["item"] for line in found if "row" in line] == ["first", "second", "third"]
    assert [line["item"] for line in found if "ended" in line] == ["crashes", "hangs"]
    assert "a library says something" in capsys.readouterr().out


def test_after_a_failed_capture_another_process_goes_on():
    """Which is no failure of the item that it was at."""
    found = list(lines([sys.executable, "-c", CHILD], ["first", "spoils", "second", "spoils"], time.monotonic() + 600))
    assert [line["item"] for line in found if "row" in line] == ["first", "spoils", "second", "spoils"]
    assert not any("ended" in line or "failed" in line for line in found)
    assert gpu_layers.FRESH == 5


def test_what_the_time_does_not_reach_is_named():
    found = list(lines([sys.executable, "-c", CHILD], ["first", "hangs", "second"], time.monotonic() + 2))
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
        row["same_bits"] = True
        print(json.dumps({"item": item, "row": {**row, "ratios": {"nn.LSTM": {"median": 1.0}}}}), flush=True)
"""


MEETS = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_commands_run_side_by_side_and_are_stopped_at_their_limit(tmp_path):
    hangs = "import time; print('begun', flush=True); time.sleep(600)"
    names = [str(tmp_path / name) for name in "ab"]
    waits = [[sys.executable, "-c", MEETS, *order] for order in (names, names[::-1])]
    found = gpu.run([*waits, [sys.executable, "-c", hangs], [sys.executable, "-c", "raise SystemExit(2)"]], 5.0)
    assert [entry["status"] for entry in found] == [0, 0, None, 2]
    assert [entry["output"] for entry in found] == ["", "", "begun\n", ""]


@pytest.fixture
def a_card(monkeypatch):
    """Of what would be run only the layers are, by ROWS; the others' commands are returned."""
    commands = []

    def run(started, limit):
        commands.append((started, limit))
        statuses = {"fastlstm.train": 1, "tests/layers/test_masks.py": None}
        return [
            {"command": gpu.shown(c), "status": next((statuses[a] for a in c if a in statuses), 0), "output": ""}
            for c in started
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)  # a CUDA build would ask the card
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: "/bin/" + name)
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "LAYERS", [sys.executable, "-c", ROWS])
    return commands


def test_what_a_gpu_would_run_is_all_reported(tmp_path, a_card):
    """Where a shape takes its process down and a command fails."""
    with pytest.raises(SystemExit, match=r"failed: .*, python -m fastlstm.train [^,]*; what they said"):
        gpu.main(["--out", str(tmp_path)])
    written, picture = sorted(tmp_path.iterdir())
    assert (written.suffix, picture.suffix) == (".json", ".png")
    report = json.loads(written.read_text())
    assert report["device"] == "A card"
    assert [goal["verdict"] for goal in report["goals"][-3:]] == [
        "pass",
        "FAIL",
        "pass",
    ]  # first calls; training; the sanitizers
    assert {(row["name"], row["precision"]) for row in report["results"]} == {
        *((str(n), precision) for n in (0, 1, 2, 4, 5, 6, 7) for precision in gpu_layers.PRECISIONS),
        *((n, precision) for n in ("8", "9") for precision in ("bf16", "tf32")),  # of the GRU
    }
    assert sum("tests/layers/test_masks.py" in name for name in report["not_reached"]) == 1  # no time left, not failed
    commands = [command for started, _ in a_card for command in started]
    assert sum("compute-sanitizer" in command[0] for command in commands) == 4 * 3  # tools, backends
    assert any("fastlstm.train" in command for command in commands)
    kinds = [("compile" if "--compile" in started[0] else "tests") for started, _ in a_card[:2]]
    assert kinds == ["compile", "tests"]  # one after the other
    compiled = [
        item for command in commands if "--compile" in command for item in command[command.index("--compile") + 1 :]
    ]
    wanted = [f"{n}:{p}:" for n in range(8) for p in gpu_layers.PRECISIONS]
    wanted += [f"{n}:{p}:" for n in (8, 9) for p in ("bf16", "tf32")]
    assert sorted(compiled) == sorted(wanted)
    files = {argument for command in commands for argument in command if argument.startswith("tests/")}
    assert all((ROOT / name).exists() for name in files)


@pytest.mark.parametrize("there", [False, True])
def test_layers_with_goals_come_first(there, monkeypatch):
    monkeypatch.setattr(gpu, "installed", lambda name: there)
    first, others = gpu.items(dry_run=False)
    assert first == ["0:bf16:", "0:tf32:"]
    assert others[:2] == ["3:fp16:", "7:bf16:"]
    assert sorted(others[2:7]) == ["1:bf16:", "2:bf16:", "4:bf16:", "5:bf16:", "6:bf16:"]
    rivals = [item for item in others if item.endswith(("torchrl", "flashrnn"))]
    goals = [*first, *others[:7]]
    wanted = [*(f"{item}torchrl" for item in goals), "4:bf16:flashrnn", "4:tf32:flashrnn"]
    assert rivals == wanted * there
    assert len({*first, *others}) == len(first) + len(others) == 8 * 4 + 2 * 2 + 1 + len(rivals)


def test_layers_with_goals_have_their_time():
    """Four measurements, each as long as it may be, without what parts that end early leave."""
    measurement = len(gpu_layers.WAYS) * len(gpu_layers.MODES) * gpu_layers.SECONDS
    left = 450 - gpu.COMPILE - gpu.TESTS - gpu.FIRST - gpu.TRAINING - gpu.LAST
    assert 2 * measurement + 10 <= gpu.FIRST  # and a process starts
    assert left >= (len(gpu.GOALS) - 2) * measurement + 10


def test_all_parts_end_in_less_than_eight_minutes(tmp_path, a_card, monkeypatch):
    """By the clock of this test alone: each part takes all of the time it is given."""
    now, given = [0.0], []

    def take(seconds):
        given.append(seconds)
        now[0] += seconds

    def layers(command, items, deadline):
        take(deadline - now[0])
        return iter(())

    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu, "lines", layers)
    monkeypatch.setattr(gpu, "run", lambda started, limit: take(limit) or [])
    gpu.main(["--out", str(tmp_path)])
    assert now[0] <= 450
    assert len(given) == 6
    assert min(given) > 40  # and every part has its time


class Words(dict):
    def __init__(self, text):
        self.text = text

    def __missing__(self, word):
        return word in self.text


@pytest.mark.parametrize("file", [gpu.KERNELS[0], gpu.MASKS])
def test_each_test_of_the_kernels_runs_once(file):
    text = interpreter.run_module("pytest", "--collect-only", "-q", *gpu.EVERY[-2:], file, cwd=ROOT).stdout
    names = [line for line in text.splitlines() if "::" in line]
    assert len(names) > 30
    counts = [[eval(kind, {}, Words(name)) for kind in gpu.KINDS] for name in names]
    assert all(each.count(True) == 1 for each in counts)
    assert all(map(any, zip(*counts, strict=True)))  # to select nothing is an error


@pytest.mark.slow
@needs_triton
def test_pytest_reports_what_was_measured(tmp_path):
    """The GPU's benchmarks in pytest, with a stand-in for the device."""
    file = tmp_path / "found.json"
    arguments = ["-q", "-rs", "-p", "tests.helpers.stand_in", "benchmarks/test_gpu.py", "-p", "no:cacheprovider"]
    arguments += ["--benchmark-only", f"--benchmark-json={file}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["TRITON_INTERPRET"] = "1"
    done = interpreter.run_module("pytest", *arguments, cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())["benchmarks"]
    assert len(found) == 2 * 2 * 2 * 2  # precisions, modes, ways, implementations
    assert {each["extra_info"]["way"] for each in found} == {"eager", "graph"}
    for each in found:
        info, rounds = each["extra_info"], each["stats"]["data"]
        assert len(rounds) == 3
        assert sorted(rounds)[1] == pytest.approx(info["seconds"])
    assert "torchrl is not installed" in done.stdout or "torchrl" in "".join(each["name"] for each in found)


@needs_triton
@pytest.mark.slow  # which compiles all kernels of one size
def test_the_hosts_time_is_measured_without_a_gpu():
    done = interpreter.run_module(
        "benchmarks.host", "--calls", "10", "--json", cwd=ROOT, environment={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["call"] for row in rows} == {"inference", "forward", "training"}
    assert len(rows) == 3 * (1 + 3 * 3)  # calls; an empty layer, and three layers in each precision
    assert all(0 < row["least"] <= row["median"] for row in rows)


def test_a_row_without_nn_lstm_is_not_drawn(tmp_path):
    """cuDNN's kernel might not be captured in a graph."""
    row = {"name": "a", "precision": "bf16", "mode": "training", "way": "graph", "ratios": {}}
    gpu.chart({"results": [row], "device": "A card"}).savefig(tmp_path / "empty.png")
