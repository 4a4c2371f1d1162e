"""Two processes give what one gives, on shares of the same batches."""

import json
import re
import subprocess
import sys

import pytest
import torch

import fastlstm.train
from fastlstm.mnist import checkpoint
from fastlstm.mnist.processes import ALONE, Processes
from fastlstm.mnist.recipe import PARTS
from tests.helpers import ROOT

SMALL = ("--batch-size=32", "--hidden-size=7", "--threads=1", "--checkpoint-every=4", "--lr=0.004", "--parts", *PARTS)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, "fastlstm.train", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def metrics(directory):
    return json.loads((directory / "metrics.json").read_text())


@pytest.mark.slow
def test_two_processes_train_as_one(tiny, tmp_path, no_pictures):
    """They read the pixels in one order, a buffer that DistributedDataParallel passes from the first process on."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--data", str(tiny), *SMALL, "--permuted", "--iterations", "9", "--out"]
    assert fastlstm.train.main([*arguments, str(one)]) == 0
    told = torchrun(*arguments, two)
    alone, together = metrics(one), metrics(two)
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert alone["backend"] == together["backend"] == "numba"
    # float32 sums in another order, carried through nine steps of Adam
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["accuracy"] == pytest.approx(alone["accuracy"], abs=1e-6)
    assert told.count("test accuracy, all 130") == 1  # rank 0 alone tells and writes
    files = {path.name for path in one.iterdir()}
    assert {path.name for path in two.iterdir() if path.suffix != ".png"} == files

    first, second = (torch.load(path / "model.pt", weights_only=True)["state_dict"] for path in (one, two))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-5, msg=name)  # as above

    (two / "metrics.json").unlink()
    assert fastlstm.train.main(["--resume", str(two)]) == 0
    assert metrics(two)["loss"] == together["loss"]
    assert metrics(two)["test_accuracy"] == pytest.approx(together["test_accuracy"], abs=1.5 / 130)


@pytest.mark.slow
def test_two_processes_continue_what_one_began(tiny, tmp_path, monkeypatch, ctrl_c):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["--data", str(tiny), *SMALL, "--iterations", "9", "--out"]
    assert fastlstm.train.main([*arguments, str(whole)]) == 0
    save = checkpoint.save

    def interrupting(path, state):
        save(path, state)
        if state["state"]["history"]["curves"].shape[1] == 4:
            ctrl_c()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupting)
        assert fastlstm.train.main([*arguments, str(cut)]) == 130
    torchrun("--resume", cut)
    assert metrics(cut)["loss"][:4] == metrics(whole)["loss"][:4]
    assert metrics(cut)["loss"] == pytest.approx(metrics(whole)["loss"], rel=1e-5)  # as above


def test_shares_are_the_batch():
    batch = torch.rand(12, 3)
    assert torch.equal(torch.cat([Processes(3, rank).share(batch) for rank in range(3)]), batch)
    assert ALONE.share(batch).equal(batch)


def test_a_batch_that_cannot_be_shared_is_refused(tiny, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stop:
        fastlstm.train.main(["--data", str(tiny), "--batch-size", "32"])
    assert stop.value.code == 2
    message = "argument --batch-size: must be a multiple of 3, the number of processes, got 32"
    assert re.fullmatch(f"python -m fastlstm.train: error: {message}\n", capsys.readouterr().err)
