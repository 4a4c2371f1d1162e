"""The GPU benchmark as far as it goes without a GPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import fastlstm.mnist.report as mnist_report
from benchmarks import gpu, gpu_layers, gpu_rivals
from benchmarks.gpu import lines
from benchmarks.gpu_layers import TINY, Bench
from fastlstm.backends import reference
from tests import stand_in
from tests.transforms import needs_triton

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


def test_help():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_it_needs_no_numba():
    code = "import sys, benchmarks.gpu; sys.exit(not {'numba', 'llvmlite'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


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
    if item == "spoils":
        sys.exit(5)
"""


def test_what_crashes_or_hangs_loses_no_other_result(capsys):
    items = ["first", "crashes", "second", "hangs", "third"]
    found = list(lines([sys.executable, "-c", CHILD], items, time.monotonic() + 600, stall=3.0))
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
        statuses = {"fastlstm.train": 1, "tests/test_masks.py": None}
        return [
            {"command": gpu.shown(c), "status": next((statuses[a] for a in c if a in statuses), 0), "output": ""}
            for c in started
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
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
    assert [goal["verdict"] for goal in report["goals"][-2:]] == ["FAIL", "pass"]  # training; the sanitizers
    assert {(row["name"], row["precision"]) for row in report["results"]} == {
        (str(n), precision) for n in (0, 1, 2, 4, 5, 6, 7) for precision in gpu_layers.PRECISIONS
    }
    assert sum("tests/test_masks.py" in name for name in report["not_reached"]) == 1  # no time left, not failed
    commands = [command for started, _ in a_card for command in started]
    assert sum("compute-sanitizer" in command[0] for command in commands) == 4 * 3  # tools, backends
    assert any("fastlstm.train" in command for command in commands)
    kinds = [("compile" if "--compile" in started[0] else "tests") for started, _ in a_card[:2]]
    assert kinds == ["compile", "tests"]  # one after the other
    compiled = [
        item for command in commands if "--compile" in command for item in command[command.index("--compile") + 1 :]
    ]
    assert sorted(compiled) == sorted(f"{n}:{p}:" for n in range(8) for p in gpu_layers.PRECISIONS)
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
    assert len({*first, *others}) == len(first) + len(others) == 8 * 4 + 1 + len(rivals)


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


def summary(accuracy):
    """What the training prints at its end."""
    run = {"lstm": "fastlstm.LSTM", "test_images": 10000, "test_accuracy": accuracy, "test_accuracy_first_128": 1.0}
    run |= {"validation_accuracy": 1.0, "iterations": 0, "interrupted": False, "time_to_99": None}
    compared = {**run, "lstm": "torch.nn.LSTM", "test_accuracy": 0.5}
    return mnist_report.summary({**run, "compare": compared, "backend": "triton", "device": "cuda", "threads": 1})


def ratios(nn_lstm, torchrl):
    return {"ratios": {"nn.LSTM": {"median": nn_lstm}, "torchrl": {"median": torchrl}}}


@pytest.fixture
def met(monkeypatch):
    """A report that meets every goal just so."""
    monkeypatch.setattr(gpu, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_rivals, "installed", lambda name: True)
    results = [
        {
            "name": str(shape), "precision": precision, "mode": mode, "way": way, "same_bits": True,
            "microseconds_a_step": 1.0, **ratios(3.0 if shape == gpu_rivals.ROW else 1.0, 1.0),
        }
        for shape, precision in gpu.GOALS for mode in gpu_layers.MODES for way in gpu_layers.WAYS
    ]  # fmt: skip
    commands = [gpu.DETERMINISM, gpu.TRAIN, *gpu.sanitizers()]
    ended = [{"command": gpu.shown(command), "status": 0, "output": summary(0.95)} for command in commands]
    return {"results": results, "commands": ended}


def verdicts(found):
    return [goal["verdict"] for goal in gpu.goals(found)]


def test_goals_are_met(met):
    assert verdicts(met) == ["pass"] * 9
    assert gpu.told(gpu.goals(met)[0]) == (
        "pass: at least 3.0 times as fast as nn.LSTM: T28-B128-I28-H128 bf16 training (eager 3.00, graph 3.00)"
    )


def test_goals_that_nothing_was_measured_for_are_open(met):
    met |= {"results": [], "commands": []}
    assert verdicts(met) == ["not measured"] * 9
    assert "T28-B128-I28-H128 tf32 training (no time)" in gpu.told(gpu.goals(met)[1])


def test_goals_of_times_are_judged_by_eager_calls(met):
    """Those from graphs decide nothing; of a layer measured again beside a rival, the first time counts."""
    for row in met["results"]:
        if row["way"] == "graph":
            row |= {"microseconds_a_step": 9.0, **ratios(0.1, 0.1)}
    met["results"] += [{**row, "microseconds_a_step": 9.0, **ratios(0.1, 0.1)} for row in met["results"]]
    assert verdicts(met) == ["pass"] * 9


@pytest.mark.parametrize(
    ("n", "where", "change"),
    [
        (0, (gpu_rivals.ROW, "bf16", "training"), ratios(2.99, 1)),
        (1, (gpu_rivals.ROW, "tf32", "training"), ratios(2.99, 1)),
        (2, (gpu_rivals.LARGER[0], "bf16", "inference"), {"microseconds_a_step": 1.01}),
        (3, (gpu_rivals.LARGER[-1], "bf16", "training"), ratios(0.99, 1)),
        (4, (gpu_rivals.BEST_OF_CUDNN, "fp16", "inference"), ratios(0.99, 1)),
        (5, (gpu_rivals.SMALLEST, "bf16", "training"), ratios(1, 0.99)),
        (6, (gpu_rivals.SMALLEST, "bf16", "training"), {"same_bits": False}),
    ],
)
def test_a_layer_misses_its_goal_and_no_other(n, where, change, met):
    for row in met["results"]:
        if (row["name"], row["precision"], row["mode"]) == (str(where[0]), *where[1:]):
            row |= change
    assert verdicts(met) == ["FAIL" if k == n else "pass" for k in range(9)]


UNINITIALIZED = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at {}+0x80 in a.py:3
"""


@pytest.mark.parametrize(
    ("n", "of", "change", "verdict"),
    [
        (6, "test_determinism", {"status": 1}, "FAIL"),
        (7, "fastlstm.train", {"status": None}, "not measured"),
        (7, "fastlstm.train", {"status": 1, "output": ""}, "FAIL"),
        (7, "fastlstm.train", {"output": summary(0.9499)}, "FAIL"),
        (8, "racecheck", {"status": 1}, "FAIL"),
        (8, "synccheck", {"status": None}, "not measured"),
        (8, "initcheck", {"output": UNINITIALIZED.format("pack_kernel")}, "FAIL"),
        (8, "initcheck", {"output": UNINITIALIZED.format("void at::native::reduce")}, "pass"),
    ],
)
def test_a_command_decides_its_goal(n, of, change, verdict, met):
    entry = next(entry for entry in met["commands"] if of in entry["command"])
    entry |= change
    assert verdicts(met) == [verdict if k == n else "pass" for k in range(9)]


def test_what_is_not_installed_leaves_its_goal_open(met, monkeypatch):
    monkeypatch.setattr(gpu, "sanitizer", lambda: None)
    monkeypatch.setattr(gpu_rivals, "installed", lambda name: False)
    rival, sanitizers = (gpu.told(gpu.goals(met)[n]) for n in (5, 8))
    assert rival == "not measured: at least 1.0 times as fast as torchrl: torchrl is not installed"
    assert sanitizers == "not measured: compute-sanitizer is clean: compute-sanitizer is not installed"


class Words(dict):
    def __init__(self, text):
        self.text = text

    def __missing__(self, word):
        return word in self.text


def test_each_test_of_the_kernels_runs_once():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/test_triton.py"]
    text = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    names = [line for line in text.splitlines() if "::" in line]
    assert len(names) > 100
    assert all([eval(kind, {}, Words(name)) for kind in gpu.KINDS].count(True) == 1 for name in names)


@needs_triton
def test_pytest_reports_what_was_measured(tmp_path):
    """The GPU's benchmarks in pytest, with a stand-in for the device."""
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "tests.stand_in", "benchmarks/test_gpu.py"]
    command += ["-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={file}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    found = json.loads(file.read_text())["benchmarks"]
    assert len(found) == 2 * 2 * 2 * 2  # precisions, modes, ways, implementations
    assert {each["extra_info"]["way"] for each in found} == {"eager", "graph"}
    for each in found:
        info, rounds = each["extra_info"], each["stats"]["data"]
        assert len(rounds) == 3
        assert sorted(rounds)[1] == pytest.approx(info["seconds"])
    assert "torchrl is not installed" in done.stdout or "torchrl" in "".join(each["name"] for each in found)


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
        if graphed.calls == 6:  # ours, nn.LSTM's and the first of the rival's can
            raise RuntimeError("it waits")
        return run

    graphed.calls = 0
    stand_in.install(monkeypatch)
    monkeypatch.setattr(gpu_layers, "graphed", graphed)
    rows = list(bench.rows(1))
    ways = {(row["way"], row["mode"]): sorted(row["seconds"]) for row in rows}
    usual = ["fastlstm", "nn.LSTM"]
    assert ways == {
        (way, mode): usual if (way, mode) == ("graph", "training") else [*usual, "ungraphed"]
        for way in gpu_layers.WAYS
        for mode in gpu_layers.MODES
    }
    assert bench.left_out["ungraphed training from a graph"] == "RuntimeError: it waits"


@needs_triton
@pytest.mark.parametrize(("fails", "failed"), [(1, True), (3, False)])
def test_no_graph_is_captured_after_a_failed_one(fails, failed, monkeypatch, torch_flags_stay, capsys):
    """nn.LSTM's is left out, with all later ones; ours fails its item. Either way another process goes on."""
    calls = []

    def graphed(run):
        calls.append(run)
        if len(calls) == fails:
            raise RuntimeError("it waits")
        return run

    stand_in.install(monkeypatch)
    monkeypatch.setattr(gpu_layers, "graphed", graphed)
    with pytest.raises(SystemExit, match="5"):
        gpu_layers.measure("0:tf32:", 1, dry_run=True)
    assert len(calls) == fails
    found = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert any("failed" in line for line in found) == failed
    graphs = [line["row"]["mode"] for line in found if "row" in line and line["row"]["way"] == "graph"]
    assert graphs == ([] if failed else ["inference", "training"])
    if not failed:
        reasons = found[-1]["left_out"]
        assert reasons["nn.LSTM inference from a graph"] == "RuntimeError: it waits"
        assert "not tried" in reasons["nn.LSTM training from a graph"]


def test_a_failed_capture_leaves_the_current_stream(monkeypatch):
    """As torch does it: `graph` makes its stream the current one, and leaves it so where the capture cannot end."""

    class Stream(str):
        def wait_stream(self, other):
            pass

    current = [Stream("usual")]

    @contextlib.contextmanager
    def stream(name):
        before, current[0] = current[0], name
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(_):
        current[0] = Stream("the capture's")
        yield
        raise RuntimeError("the capture cannot end")

    stand_in.install(monkeypatch)
    fakes = {"stream": stream, "graph": graph, "current_stream": lambda: current[0]}
    for name, fake in {**fakes, "Stream": lambda: Stream("warm-up")}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with pytest.raises(RuntimeError, match="cannot end"):
        gpu_layers.graphed(lambda: None)
    assert current == ["usual"]


@needs_triton
@pytest.mark.parametrize("way", gpu_layers.WAYS)
def test_calls_from_the_host_begin_when_the_flush_has_ended(way, monkeypatch, torch_flags_stay):
    done = []
    stand_in.install(monkeypatch)
    monkeypatch.setattr(gpu_layers, "WARM_UP", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    monkeypatch.setattr(gpu_layers, "seconds_of", lambda run, device: run() or 1.0)
    bench = Bench(TINY[0], "tf32", "cpu", [])
    bench.graphs = {"inference": {"a": lambda: done.append("ran")}}
    monkeypatch.setattr(bench, "modules", {"a": None})
    monkeypatch.setattr(bench, "run", lambda name, mode: bench.graphs[mode][name])
    bench.times("inference", way, 2)
    assert done == (["waited", "ran"] if way == "eager" else ["ran"]) * 2


@needs_triton
@pytest.mark.parametrize("backend", ["triton", "triton-ieee"])
def test_the_sanitizers_see_every_variant(backend, monkeypatch):
    from fastlstm.backends.triton import launch, products, resident, stepwise

    monkeypatch.setattr(launch, "project", launch.project)
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "")
    calls = {}
    for module, names in ((resident, gpu.OURS), (stepwise, gpu.OURS), (launch, ["kns=pack_kernel"])):
        for name in (option.removeprefix("kns=") for option in names if hasattr(module, option.removeprefix("kns="))):
            arguments = getattr(products if module is launch else module, name).arg_names
            made = calls[module, name] = []

            class Recorded:
                def __getitem__(self, grid, arguments=arguments, made=made):
                    return lambda *given, **_: made.append(dict(zip(arguments, given)))

            monkeypatch.setattr(module, name, Recorded())
    gpu_layers.exercise(backend, "cpu")
    for module in (resident, stepwise):
        forward, backward = (calls[module, f"{name}_kernel"] for name in ("forward", "backward"))
        for made, names in ((forward, ("mask", "gates")), (backward, ("mask", "dh", "dc", "dh_n"))):
            for name in names if module is resident or made is forward else names[:-1]:
                assert {call[f"{name}_ptr"] is None for call in made} == {False, True}, name
            assert {call["rows"] < call["B"] for call in made} == {False, True}  # groups
            if module is resident:
                assert {call["reverse"] for call in made} == {0, 1}
            else:
                assert {call["t"] > call["t_prev"] for call in made} == {False, True}
    if backend == "triton":
        assert {call["bias_ptr"] is None for call in calls[resident, "forward_kernel"]} == {False, True}
    assert bool(calls[launch, "pack_kernel"]) == (backend != "triton")


def test_layers_are_projected_without_the_matrix_unit():
    x = torch.randn(3, 4, 5)
    for weight, bias in ((torch.randn(8, 5), torch.randn(8)), (torch.randn(2, 8, 5), torch.randn(2, 8))):
        for given in (bias, None):
            want = reference.add_bias(reference.linear(x, weight), given)
            torch.testing.assert_close(gpu_layers.project(x, weight, given), want)


def test_a_row_without_nn_lstm_is_not_drawn(tmp_path):
    """cuDNN's kernel might not be captured in a graph."""
    row = {"name": "a", "precision": "bf16", "mode": "training", "way": "graph", "ratios": {}}
    gpu.chart({"results": [row], "device": "A card"}).savefig(tmp_path / "empty.png")


@needs_triton
def test_layers_are_timed_by_events_and_from_graphs(monkeypatch, torch_flags_stay, capsys):
    stand_in.install(monkeypatch)
    gpu_layers.measure("0:tf32:", 2, dry_run=True)
    gpu_layers.compile_kernels("1:tf32:", dry_run=True)
    began, *found = map(json.loads, capsys.readouterr().out.splitlines())
    assert began == {"item": "0:tf32:", "began": True}
    assert [(line["row"]["way"], line["row"]["mode"]) for line in found] == [
        (way, mode) for way in gpu_layers.WAYS for mode in gpu_layers.MODES
    ]


def test_rivals_that_are_not_installed_say_so(monkeypatch, torch_flags_stay):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bench = Bench(TINY[0], "bf16", "cpu", ["torchrl"])
    assert bench.left_out == {"torchrl": "the package torchrl is not installed"}
