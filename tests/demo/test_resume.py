"""Checkpoints and models: a run that was cut short continues bit for bit, and a damaged file is refused by name."""

import io
import os
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import fastlstm.export
import fastlstm.predict
import fastlstm.train
from fastlstm.mnist import pictures, saved
from fastlstm.mnist.recipe import PARTS
from fastlstm.mnist.state import Checkpoint
from tests.helpers.demo import PNG, SMALL, figures
from tests.helpers.idx import TEST_IMAGES, tiny_arrays, write_set

pytestmark = pytest.mark.usefixtures("no_pictures")
EXTERNAL_ATTR = 38  # offset in an entry of a ZIP archive's directory
OPTIONS = (*SMALL, "--lr=0.004", "--parts", *PARTS)
DEEP = ("--layers", "2", "--dropout", "0.3", "--bidirectional")


def weights(directory):
    return torch.load(directory / "model.pt", weights_only=True)["state_dict"]


class Stopped(Exception):
    pass


def test_a_run_that_was_cut_short_continues_bit_for_bit(tiny, tmp_path, train, monkeypatch):
    arguments = ["--data", tiny, "--iterations", "10", *OPTIONS, *DEEP, "--compare", "--checkpoint-every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*arguments, "--out", whole)
    keep, begun = Checkpoint.keep, []

    def stopping(checkpoint, name, state):  # the process's end: the second checkpoint is never begun
        if state.done == 6:
            raise Stopped
        keep(checkpoint, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep", stopping)
        with pytest.raises(Stopped):
            train(*arguments, "--out", cut)
        assert not (cut / "metrics.json").exists()
        patch.setattr(Checkpoint, "keep", lambda *given: begun.append(given[2].done) or keep(*given))
        train("--resume", cut, "--checkpoint-every", "3")
    assert begun[0] == 6  # it has not begun anew
    assert figures(cut) == figures(whole)
    first, second = weights(cut), weights(whole)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_ctrl_c_leaves_a_run_that_can_be_continued(tiny, tmp_path, train, interrupted, capsys):
    arguments = ["--data", tiny, "--iterations", "9", *OPTIONS, "--checkpoint-every", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*arguments, "--out", whole)
    interrupted(4, *arguments, "--out", cut)
    assert figures(cut)["interrupted"] is True
    assert f"--resume {cut}" in capsys.readouterr().out
    for _ in range(2):  # a finished run is reported again
        train("--resume", cut)
        assert figures(cut) == figures(whole)
        (cut / "metrics.json").unlink()


def test_a_new_run_does_not_take_up_an_old_one(tiny, tmp_path, train):
    arguments = ["--data", tiny, *OPTIONS, "--out", tmp_path]
    train(*arguments, "--iterations", "3")
    train(*arguments, "--iterations", "5", "--seed", "1")
    assert len(figures(tmp_path)["loss"]) == figures(tmp_path)["iterations"] == 5


@pytest.mark.parametrize(
    "given", [("--lr", "0.1"), ("--out", "x"), ("--compare",), ("--epochs", "3"), ("--layers", "2")]
)
def test_a_resumed_run_keeps_its_recipe_and_its_images(tiny, tmp_path, train, refused, given):
    train("--data", tiny, "--iterations", "1", *OPTIONS, "--out", tmp_path / "run")
    assert f"argument {given[0]}: " in refused(fastlstm.train.main, "--resume", tmp_path / "run", *given)
    others = write_set(tmp_path / "others", tiny_arrays())
    line = refused(fastlstm.train.main, "--resume", tmp_path / "run", "--data", others)
    assert f"--resume: {tmp_path / 'run' / 'checkpoint.pt'}: " in line


FILES = {"train": "checkpoint.pt", "predict": "model.pt", "export": "model.pt"}


def outcome(command, directory):
    """The exit code of a command that reads the run in `directory`, what it says of errors, and what it leaves."""
    main, *arguments = {
        "train": (fastlstm.train.main, "--resume", directory),
        "predict": (fastlstm.predict.main, directory / TEST_IMAGES, "--model", directory),
        "export": (fastlstm.export.main, directory, directory / "exported"),
    }[command]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code = main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    results = {"train": lambda: figures(directory), "export": (directory / "exported").read_bytes}
    return code, err.getvalue(), results.get(command, out.getvalue)() if code == 0 else None


@pytest.mark.parametrize("command", FILES)
def test_what_no_run_has_left_is_named_and_not_run(tmp_path, command):
    """Other contents, code, nothing, and a folder."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / FILES[command]
    makes = (
        lambda: saved.write(path, {"states": {}}),
        lambda: saved.write(path, {"options": Trap(), "config": Trap()}),
        path.unlink,
        path.mkdir,
    )
    for make in makes:
        make()
        code, error, _ = outcome(command, tmp_path)
        assert (code, error.count("\n"), str(path) in error) == (2, 1, True)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's directory, and beside its files the images that they were trained on."""
    directory = write_set(tmp_path_factory.mktemp("finished"), tiny_arrays())
    options = [*map(str, OPTIONS), "--iterations=4", "--checkpoint-every=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "of_runs", lambda *arguments: {})
        assert fastlstm.train.main(["--data", str(directory), *options, "--out", str(directory)]) == 0
    return directory


def read_over_by_torch(content):
    """Places of a bit of a weight, which `torch.load` reads as another number, and of the flags of the archive's parts,
    by which it takes a part for a folder and leaves a tensor as its memory was.
    """
    tensors = filter(torch.is_tensor, tree_leaves(torch.load(io.BytesIO(content), weights_only=True)))
    largest = max(tensors, key=torch.Tensor.numel)
    parts = [entry.start() + EXTERNAL_ATTR for entry in re.finditer(b"PK\x01\x02", content)]
    return [(content.index(largest.numpy().tobytes()), 0), *((place, 4) for place in parts)]


@st.composite
def flipped(draw, content):
    """The content, cut somewhere or not, with up to three bits flipped, or one that torch reads over."""
    if draw(st.booleans()):
        length, bits = len(content), [draw(st.sampled_from(read_over_by_torch(content)))]
    else:
        length = draw(st.just(len(content)) | st.integers(1, len(content)))
        bits = draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(0, 7)), max_size=3))
    damaged = bytearray(content[:length])
    for place, bit in bits:
        damaged[place] ^= 1 << bit
    return bytes(damaged)


FOREIGN = st.sampled_from([b"", PNG, b"PK\x03\x04" + b"\0" * 40]) | st.binary(max_size=200)


@pytest.mark.parametrize("command", FILES)
@given(data=st.data())
@settings(max_examples=40)
def test_a_damaged_file_is_named_in_one_line(finished, command, data):
    path = finished / FILES[command]
    whole = path.read_bytes()
    try:  # a run that goes on writes the file anew, and a draw may end the test
        _, _, expected = outcome(command, finished)
        path.write_bytes(data.draw(flipped(whole) | flipped(whole) | FOREIGN))
        code, error, result = outcome(command, finished)
    finally:
        path.write_bytes(whole)
    if code == 0:  # the damage lies in bytes that hold no value, such as the gaps of the archive
        assert result == expected
    else:
        assert (code, error.count("\n"), f"{path}: " in error) == (2, 1, True), error
