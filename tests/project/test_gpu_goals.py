"""What the GPU benchmark says of its goals, given what was measured."""

import pytest

import fastlstm.mnist.report as mnist_report
from benchmarks import gpu, gpu_goals, gpu_layers


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
    monkeypatch.setattr(gpu_goals, "installed", lambda name: True)
    results = [
        {
            "name": str(shape), "precision": precision, "mode": mode, "way": way, "same_bits": True,
            "microseconds_a_step": 1.0, **ratios(3.0 if shape == gpu_goals.ROW else 1.0, 1.0),
        }
        for shape, precision in gpu.GOALS for mode in gpu_layers.MODES for way in gpu_layers.WAYS
    ]  # fmt: skip
    commands = [gpu.DETERMINISM, *gpu.first_calls(), gpu.TRAIN, *gpu.sanitizers()]
    ended = [{"command": gpu.shown(command), "status": 0, "output": summary(0.95)} for command in commands]
    return {"results": results, "commands": ended}


def verdicts(found):
    return [goal["verdict"] for goal in gpu.goals(found)]


def test_goals_are_met(met):
    assert verdicts(met) == ["pass"] * 10
    assert gpu.told(gpu.goals(met)[0]) == (
        "pass: at least 3.0 times as fast as nn.LSTM: T28-B128-I28-H128 bf16 training (eager 3.00, graph 3.00)"
    )


def test_goals_that_nothing_was_measured_for_are_open(met):
    met |= {"results": [], "commands": []}
    assert verdicts(met) == ["not measured"] * 10
    assert "T28-B128-I28-H128 tf32 training (no time)" in gpu.told(gpu.goals(met)[1])


def test_goals_of_times_are_judged_by_eager_calls(met):
    """Those from graphs decide nothing; of a layer measured again beside a rival, the first time counts."""
    for row in met["results"]:
        if row["way"] == "graph":
            row |= {"microseconds_a_step": 9.0, **ratios(0.1, 0.1)}
    met["results"] += [{**row, "microseconds_a_step": 9.0, **ratios(0.1, 0.1)} for row in met["results"]]
    assert verdicts(met) == ["pass"] * 10


@pytest.mark.parametrize(
    ("n", "where", "change"),
    [
        (0, (gpu_goals.ROW, "bf16", "training"), ratios(2.99, 1)),
        (1, (gpu_goals.ROW, "tf32", "training"), ratios(2.99, 1)),
        (2, (gpu_goals.LARGER[0], "bf16", "inference"), {"microseconds_a_step": 1.01}),
        (3, (gpu_goals.LARGER[-1], "bf16", "training"), ratios(0.99, 1)),
        (4, (gpu_goals.BEST_OF_CUDNN, "fp16", "inference"), ratios(0.99, 1)),
        (5, (gpu_goals.SMALLEST, "bf16", "training"), ratios(1, 0.99)),
        (6, (gpu_goals.SMALLEST, "bf16", "training"), {"same_bits": False}),
    ],
)
def test_a_layer_misses_its_goal_and_no_other(n, where, change, met):
    for row in met["results"]:
        if (row["name"], row["precision"], row["mode"]) == (str(where[0]), *where[1:]):
            row |= change
    assert verdicts(met) == ["FAIL" if k == n else "pass" for k in range(10)]


UNINITIALIZED = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at {}+0x80 in a.py:3
"""


@pytest.mark.parametrize(
    ("n", "of", "change", "verdict"),
    [
        (6, "test_determinism", {"status": 1}, "FAIL"),
        (7, "FASTLSTM_CHECK=1", {"status": 1}, "FAIL"),
        (8, "fastlstm.train", {"status": None}, "not measured"),
        (8, "fastlstm.train", {"status": 1, "output": ""}, "FAIL"),
        (8, "fastlstm.train", {"output": summary(0.9499)}, "FAIL"),
        (9, "racecheck", {"status": 1}, "FAIL"),
        (9, "synccheck", {"status": None}, "not measured"),
        (9, "initcheck", {"output": UNINITIALIZED.format("pack_kernel")}, "FAIL"),
        (9, "initcheck", {"output": UNINITIALIZED.format("void at::native::reduce")}, "pass"),
    ],
)
def test_a_command_decides_its_goal(n, of, change, verdict, met):
    entry = next(entry for entry in met["commands"] if of in entry["command"])
    entry |= change
    assert verdicts(met) == [verdict if k == n else "pass" for k in range(10)]


def test_what_is_not_installed_leaves_its_goal_open(met, monkeypatch):
    monkeypatch.setattr(gpu, "sanitizer", lambda: None)
    monkeypatch.setattr(gpu_goals, "installed", lambda name: False)
    rival, sanitizers = (gpu.told(gpu.goals(met)[n]) for n in (5, 9))
    assert rival == "not measured: at least 1.0 times as fast as torchrl: torchrl is not installed"
    assert sanitizers == "not measured: compute-sanitizer is clean: compute-sanitizer is not installed"
