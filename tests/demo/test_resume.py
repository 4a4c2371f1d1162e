"""Checkpoints: a run that was cut short continues bit for bit, and what is no checkpoint of it is refused by name."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastlstm.train
from fastlstm.files import replacing
from fastlstm.mnist import checkpoint, training
from fastlstm.mnist.checkpoint import CheckpointError, Keeper
from fastlstm.mnist.data import Batches, load
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.recipe import PARTS, Recipe
from tests.helpers import ROOT
from tests.helpers.demo import SMALL, figures
from tests.helpers.idx import tiny_arrays, write_set

pytestmark = pytest.mark.usefixtures("no_pictures")
OPTIONS = (*SMALL, "--lr=0.004", "--parts", *PARTS)
DEEP = ("--layers", "2", "--dropout", "0.3", "--bidirectional")


def weights(directory):
    return torch.load(directory / "model.pt", weights_only=True)["state_dict"]


class Stopped(Exception):
    pass


def stop_after(monkeypatch, saves):
    """The process's end, as a checkpoint's writer sees it: the next one is never begun."""
    left = iter(range(saves))
    save = checkpoint.save

    def limited(path, state):
        if next(left, None) is None:
            raise Stopped
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", limited)


@pytest.mark.parametrize("saves", [1, 2, 4])  # at the start; in the first epoch; with all but the last iterations done
@pytest.mark.parametrize("more", [(), (*DEEP, "--compare")])
def test_a_run_that_was_cut_short_continues_bit_for_bit(tiny, tmp_path, train, monkeypatch, saves, more):
    arguments = ["--data", tiny, "--iterations", "10", *OPTIONS, *more, "--checkpoint-every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*arguments, "--out", whole)
    with monkeypatch.context() as patch:
        stop_after(patch, saves)
        with pytest.raises(Stopped):
            train(*arguments, "--out", cut)
    assert not (cut / "metrics.json").exists()
    done, iterations, save = iterations_in(cut / "checkpoint.pt"), [], checkpoint.save

    def noting(path, state):
        save(path, state)
        if path.name == "checkpoint.pt":
            iterations.append(iterations_in(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", noting)
        train("--resume", cut, "--checkpoint-every", "3")
    assert min(iterations) >= done  # it has not begun anew
    assert figures(cut) == figures(whole)
    first, second = weights(cut), weights(whole)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_ctrl_c_leaves_a_run_that_can_be_continued(tiny, tmp_path, train, interrupted, capsys):
    arguments = ["--data", tiny, "--iterations", "9", *OPTIONS, "--checkpoint-every", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*arguments, "--out", whole)
    interrupted(4, *arguments, "--out", cut)
    assert figures(cut)["interrupted"] is True
    assert f"continue with --resume {cut}" in capsys.readouterr().out
    train("--resume", cut)
    assert figures(cut) == figures(whole)


def test_a_finished_run_is_reported_again(tiny, tmp_path, train):
    train("--data", tiny, "--iterations", "4", *OPTIONS, "--out", tmp_path)
    before = figures(tmp_path)
    (tmp_path / "metrics.json").unlink()
    train("--resume", tmp_path)
    assert figures(tmp_path) == before


def test_kill_9_loses_at_most_the_interval(tiny, tmp_path, train):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "fastlstm.train", "--data", str(tiny), "--iterations", "300", *OPTIONS]
    command += ["--checkpoint-every", "20"]
    running = subprocess.Popen([*command, "--out", str(cut)], cwd=ROOT, stderr=subprocess.DEVNULL)
    path = cut / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None:
        if path.exists() and iterations_in(path) >= 40:
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (cut / "metrics.json").exists()
    done = iterations_in(path)
    assert done >= 40
    assert done % 20 == 0
    train("--resume", cut)
    train(*command[3:], "--out", whole)
    assert figures(cut) == figures(whole)
    left = {entry.name for entry in cut.iterdir()} - {entry.name for entry in whole.iterdir()}
    assert all(re.fullmatch(r"\.checkpoint\.pt\.\d+", name) for name in left)  # at most the one it died in


def iterations_in(path):
    return checkpoint.load(path)["state"]["history"]["curves"].shape[1]


def test_a_new_run_does_not_take_up_an_old_one(tiny, tmp_path, train):
    arguments = ["--data", tiny, *OPTIONS, "--out", tmp_path]
    train(*arguments, "--iterations", "3", "--compare")
    assert (tmp_path / "checkpoint-compare.pt").exists()
    train(*arguments, "--iterations", "5", "--seed", "1")
    assert figures(tmp_path)["iterations"] == 5
    assert not (tmp_path / "checkpoint-compare.pt").exists()


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    keeper = Keeper(directory / "checkpoint.pt", {"lstm": "small"}, every=2)
    recipe = Recipe(iterations=4, batch_size=32, parts=tuple(PARTS))
    training.train(RowLSTM(3, 7), load(tiny).train, recipe, keeper=keeper)
    return keeper.path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda b: b"", "expected a checkpoint that begins with .*, found b''"),
        (lambda b: b"PK\x03\x04" + b[4:], "expected a checkpoint that begins with .*, found b'PK"),
        (lambda b: b.replace(b"version 1", b"version 9", 1), "expected a checkpoint that begins with .*version 9"),
        (lambda b: b[:50], "expected a whole checkpoint, .*, found -?[0-9]+ bytes"),
        (lambda b: b[:-1], "expected a whole checkpoint, .*, found [0-9]+ bytes"),
        (lambda b: b + b"\0", "expected a whole checkpoint, .*, found [0-9]+ bytes"),
        (lambda b: b[:3000] + bytes([b[3000] ^ 1]) + b[3001:], "expected a whole checkpoint, .*, found [0-9]+ bytes"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(finished, tmp_path, refused, damage, expected):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damage(finished))
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: {expected}"):
        checkpoint.load(path)
    line = refused(fastlstm.train.main, "--resume", tmp_path)
    assert re.fullmatch(f"python -m fastlstm.train: error: argument --resume: .*{expected}.*\n", line)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: expected a checkpoint, found none"):
        checkpoint.load(tmp_path / "nowhere")


def test_no_code_of_a_checkpoint_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    checkpoint.save(tmp_path / "trap", {"about": Trap()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.load(tmp_path / "trap")
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_another_run_is_refused(finished, tmp_path, tiny):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(finished)
    other = Keeper(path, {"lstm": "large"}, resume=True)
    with pytest.raises(CheckpointError, match="expected a checkpoint with lstm = 'large', found 'small'"):
        training.train(RowLSTM(3, 7), load(tiny).train, Recipe(iterations=4, batch_size=32), keeper=other)


def test_other_images_are_refused(tiny, tmp_path, train, refused, capsys):
    train("--data", tiny, "--iterations", "2", *OPTIONS, "--out", tmp_path / "run")
    others = write_set(tmp_path / "others", tiny_arrays())
    capsys.readouterr()
    line = refused(fastlstm.train.main, "--resume", tmp_path / "run", "--data", others)
    assert "checkpoint.pt: expected a checkpoint with images = " in line


@pytest.mark.parametrize(
    "given", [("--lr", "0.1"), ("--out", "x"), ("--compare",), ("--epochs", "3"), ("--layers", "2")]
)
def test_a_resumed_run_keeps_its_recipe(tmp_path, refused, given):
    line = refused(fastlstm.train.main, "--resume", tmp_path, *given)
    assert f"error: argument {given[0]}: must be left out with --resume" in line


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half():
        with replacing(path) as file:
            file.write(b"half of the n")
            raise Stopped

    with pytest.raises(Stopped):
        half()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 20])  # of 40 examples in batches of 7: within and across epochs
def test_batches_are_taken_up_where_they_were(taken):
    first = Batches(40, 7, torch.Generator().manual_seed(3))
    for _ in range(taken):
        next(first)
    second = Batches(40, 7, torch.Generator().manual_seed(4))
    second.load_state_dict(first.state_dict())
    for _ in range(15):
        assert torch.equal(next(first), next(second))
