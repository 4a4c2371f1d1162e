"""Two processes give what one gives, on shares of the same batches."""

import subprocess
import sys

import pytest
import torch

import fastlstm.train
from fastlstm.mnist.processes import ALONE, Processes
from fastlstm.mnist.recipe import PARTS
from tests.helpers import ROOT
from tests.helpers.demo import SMALL, metrics

OPTIONS = (*SMALL, "--backend=auto", "--checkpoint-every=4", "--lr=0.004", "--parts", *PARTS)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, "fastlstm.train", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_as_one(tiny, tmp_path, train, no_pictures):
    """They read the pixels in one order, a buffer that DistributedDataParallel passes from the first process on."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--data", tiny, *OPTIONS, "--permuted", "--iterations", "9", "--out"]
    train(*arguments, one)
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
    train("--resume", two)
    assert metrics(two)["loss"] == together["loss"]
    assert metrics(two)["test_accuracy"] == pytest.approx(together["test_accuracy"], abs=1.5 / 130)


@pytest.mark.slow
def test_two_processes_continue_what_one_began(tiny, tmp_path, train, interrupted):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["--data", tiny, *OPTIONS, "--iterations", "9", "--out"]
    train(*arguments, whole)
    interrupted(4, *arguments, cut)
    torchrun("--resume", cut)
    assert metrics(cut)["loss"][:4] == metrics(whole)["loss"][:4]
    assert metrics(cut)["loss"] == pytest.approx(metrics(whole)["loss"], rel=1e-5)  # as above


def test_shares_are_the_batch():
    batch = torch.rand(12, 3)
    assert torch.equal(torch.cat([Processes(3, rank).share(batch) for rank in range(3)]), batch)
    assert ALONE.share(batch).equal(batch)


def test_a_batch_that_cannot_be_shared_is_refused(tiny, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    line = refused(fastlstm.train.main, "--data", tiny, "--batch-size", "32")
    message = "argument --batch-size: must be a multiple of 3, the number of processes, got 32"
    assert line == f"python -m fastlstm.train: error: {message}\n"
