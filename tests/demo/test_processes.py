"""Two processes give what one gives, on shares of the same batches."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastlstm.train
from fastlstm.mnist.processes import ALONE, Processes
from fastlstm.mnist.recipe import PARTS
from tests.helpers import ROOT
from tests.helpers.demo import SMALL, figures, metrics

OPTIONS = (*SMALL, "--backend=auto", "--checkpoint-every=4", "--lr=0.004", "--parts", *PARTS)


def torchrun(*arguments, restarts=0, program=("-m", "fastlstm.train")):
    """A running `torchrun` of two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", *program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def finish(running):
    out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    return out, err


@pytest.mark.slow
def test_two_processes_train_as_one(tiny, tmp_path, train, no_pictures):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["--data", tiny, *OPTIONS, "--iterations", "9", "--out"]
    train(*arguments, one)
    out, err = finish(torchrun(*arguments, two))
    assert "Warning" not in err
    alone, together = metrics(one), metrics(two)
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert alone["backend"] == together["backend"] == "numba"
    # float32 sums in another order, carried through nine steps of Adam
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert together["accuracy"] == pytest.approx(alone["accuracy"], abs=1e-6)
    assert out.count("validation accuracy") == 1  # rank 0 alone tells and writes
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
def test_two_processes_continue_what_one_began(tiny, tmp_path, train, interrupted, no_pictures):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["--data", tiny, *OPTIONS, "--iterations", "9", "--out"]
    train(*arguments, whole)
    interrupted(4, *arguments, cut)
    finish(torchrun("--resume", cut))
    assert metrics(cut)["loss"][:4] == metrics(whole)["loss"][:4]
    # the steps after it by sums in another order, as above
    assert metrics(cut)["loss"] == pytest.approx(metrics(whole)["loss"], rel=1e-5)


THREADS = """
import os, sys, threading
import fastlstm.train
code = fastlstm.train.main(sys.argv[1:])
print("threads of no Python:", len(os.listdir("/proc/self/task")) - threading.active_count())
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads by Linux's /proc")
def test_no_thread_of_the_group_outlives_it(tiny, tmp_path):
    """Gloo's threads at the end of an interpreter now and then abort the process, and torchrun then ends all others."""
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    arguments = "--data", tiny, *OPTIONS, "--iterations", "2", "--out", tmp_path / "out"
    out, _ = finish(torchrun(*arguments, program=[str(script)]))
    assert out.count("threads of no Python: 0\n") == 2


def worker_of(agent):
    """The process id of the last process that torchrun has started."""
    children = f"/proc/{agent}/task/{agent}/children"
    with open(children) as file:
        return int(file.read().split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the worker by Linux's /proc")
def test_an_elastic_restart_after_a_killed_worker_ends_as_an_undisturbed_run(tiny, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["--data", tiny, *OPTIONS, "--iterations", "200", "--out"]
    finish(torchrun(*arguments, whole))
    running, path, deadline = torchrun(*arguments, cut, restarts=1), cut / "checkpoint.pt", time.monotonic() + 120
    while not (path.exists() and iterations_in(path) >= 8):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.01)
    os.kill(worker_of(running.pid), signal.SIGKILL)
    killed_at = iterations_in(path)
    _, err = finish(running)
    assert f"| {killed_at}/200" in err or f"| {killed_at + 4}/200" in err  # the progress bar goes on from there
    assert figures(cut) == figures(whole)


def iterations_in(path):
    state = torch.load(path, weights_only=True)["states"]["fastlstm.LSTM"]  # empty before the first iterations
    return len(state["history"]["loss"]) if state else 0


def test_shares_are_the_batch():
    batch = torch.rand(12, 3)
    assert torch.equal(torch.stack([Processes(3, rank).share(batch) for rank in range(3)]), batch.view(3, 4, 3))
    assert ALONE.share(batch).equal(batch)


def test_a_batch_that_cannot_be_shared_is_refused(tiny, monkeypatch, refused):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert "argument --batch-size: " in refused(fastlstm.train.main, "--data", tiny, "--batch-size", "32")
