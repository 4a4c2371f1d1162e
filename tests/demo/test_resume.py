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


def iterations_in(path):
    state = torch.load(path, weights_only=True)["states"].get("fastlstm.LSTM")
    return len(state["history"]["loss"]) if state else 0


class Stopped(Exception):
    pass


# at the start; in the first epoch; with all but the last iterations done
@pytest.mark.parametrize("writings", [0, 1, 3])
@pytest.mark.parametrize("more", [(), (*DEEP, "--compare")])
def test_a_run_that_was_cut_short_continues_bit_for_bit(tiny, tmp_path, train, monkeypatch, writings, more):
    arguments = ["--data", tiny, "--iterations", "10", *OPTIONS, *more, "--checkpoint-every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*arguments, "--out", whole)
    keep, left, begun = Checkpoint.keep, iter(range(writings)), []

    def limited(checkpoint, name, state):  # the process's end: the next checkpoint is never begun
        if next(left, None) is None:
            raise Stopped
        keep(checkpoint, name, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "keep", limited)
        with pytest.raises(Stopped):
            train(*arguments, "--out", cut)
        assert not (cut / "metrics.json").exists()
        assert iterations_in(cut / "checkpoint.pt") == 3 * writings
        patch.setattr(Checkpoint, "keep", lambda *given: begun.append(given[2].done) or keep(*given))
        train("--resume", cut, "--checkpoint-every", "3")
    assert begun[0] == min(3 * writings + 3, 10)  # the next one: it has not begun anew
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
    train("--resume", cut)
    assert figures(cut) == figures(whole)
    (cut / "metrics.json").unlink()
    train("--resume", cut)  # a finished run is reported again
    assert figures(cut) == figures(whole)


def test_a_folder_in_the_place_of_the_checkpoint_is_named(tiny, tmp_path, refused):
    path = tmp_path / "checkpoint.pt"
    path.mkdir()
    line = refused(fastlstm.train.main, "--data", tiny, *OPTIONS, "--out", tmp_path)
    assert f"error: {path}: cannot be written" in line


def test_a_new_run_does_not_take_up_an_old_one(tiny, tmp_path, train):
    arguments = ["--data", tiny, *OPTIONS, "--out", tmp_path]
    train(*arguments, "--iterations", "3")
    train(*arguments, "--iterations", "5", "--seed", "1")
    assert figures(tmp_path)["iterations"] == iterations_in(tmp_path / "checkpoint.pt") == 5


def test_other_images_are_refused(tiny, tmp_path, train, refused):
    train("--data", tiny, "--iterations", "2", *OPTIONS, "--out", tmp_path / "run")
    others = write_set(tmp_path / "others", tiny_arrays())
    line = refused(fastlstm.train.main, "--resume", tmp_path / "run", "--data", others)
    assert f"--resume: {tmp_path / 'run' / 'checkpoint.pt'}: " in line


@pytest.mark.parametrize(
    "given", [("--lr", "0.1"), ("--out", "x"), ("--compare",), ("--epochs", "3"), ("--layers", "2")]
)
def test_a_resumed_run_keeps_its_recipe(tiny, tmp_path, train, refused, given):
    train("--data", tiny, "--iterations", "1", *OPTIONS, "--out", tmp_path)
    assert f"argument {given[0]}: " in refused(fastlstm.train.main, "--resume", tmp_path, *given)


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
def test_no_code_of_a_file_is_run(tmp_path, command):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / FILES[command]
    saved.write(path, {"options": Trap(), "config": Trap()})
    code, error, _ = outcome(command, tmp_path)
    assert (code, error.count("\n"), f"{path}: " in error) == (2, 1, True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("command", FILES)
def test_a_missing_file_and_a_directory_in_its_place_are_named(tmp_path, command):
    path = tmp_path / FILES[command]
    assert f"{path}: " in outcome(command, tmp_path)[1]
    path.mkdir()
    code, error, _ = outcome(command, tmp_path)
    assert (code, error.count("\n"), f"{path}" in error) == (2, 1, True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's directory, and beside its files the images that they were trained on."""
    directory = write_set(tmp_path_factory.mktemp("finished"), tiny_arrays())
    options = [*map(str, OPTIONS), "--iterations=4", "--checkpoint-every=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "of_runs", lambda *arguments: {})
        assert fastlstm.train.main(["--data", str(directory), *options, "--out", str(directory)]) == 0
    return directory


@st.composite
def flipped(draw, content):
    """The content, cut somewhere or not, with up to three bits flipped."""
    damaged = bytearray(content[: draw(st.just(len(content)) | st.integers(1, len(content)))])
    for place in draw(st.lists(st.integers(0, len(damaged) - 1), max_size=3)):
        damaged[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(damaged)


FOREIGN = st.sampled_from([b"", PNG, b"PK\x03\x04" + b"\0" * 40]) | st.binary(max_size=200)


def test_a_file_of_other_contents_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    saved.write(path, {"states": {}})
    code, error, _ = outcome("train", tmp_path)
    assert (code, error.count("\n"), f"{path}: " in error) == (2, 1, True)


@pytest.mark.parametrize("command", FILES)
def test_a_flipped_bit_of_a_weight_is_found(finished, command):
    """Which `torch.load` reads as another number."""
    path = finished / FILES[command]
    whole = path.read_bytes()
    content = torch.load(io.BytesIO(whole), weights_only=True)
    largest = max((a for a in tree_leaves(content) if isinstance(a, torch.Tensor)), key=torch.Tensor.numel)
    damaged = bytearray(whole)
    damaged[whole.index(largest.numpy().tobytes())] ^= 1
    path.write_bytes(damaged)
    try:
        code, error, _ = outcome(command, finished)
    finally:
        path.write_bytes(whole)
    assert (code, error.count("\n"), f"{path}: " in error) == (2, 1, True)


@pytest.mark.parametrize("command", FILES)
def test_a_part_that_is_marked_as_a_folder_is_read_all_the_same(finished, command):
    """By a bit that no checksum covers, and for which `torch.load` leaves a tensor as its memory was."""
    path = finished / FILES[command]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for entry in re.finditer(b"PK\x01\x02", whole):  # of the archive's directory
        damaged[entry.start() + EXTERNAL_ATTR] |= 0x10
    try:
        _, _, expected = outcome(command, finished)
        path.write_bytes(damaged)
        code, error, result = outcome(command, finished)
    finally:
        path.write_bytes(whole)
    assert (code, error if code else "", result) == (0, "", expected)


@pytest.mark.parametrize("command", FILES)
@given(data=st.data())
@settings(max_examples=25)
def test_a_damaged_file_is_named_in_one_line(finished, command, data):
    path = finished / FILES[command]
    whole = path.read_bytes()
    try:  # a run that goes on writes the file anew, and a draw may end the test
        _, _, expected = outcome(command, finished)
        path.write_bytes(data.draw(st.one_of(flipped(whole), FOREIGN)))
        code, error, result = outcome(command, finished)
    finally:
        path.write_bytes(whole)
    if code == 0:  # the damage lies in bytes that hold no value, such as the gaps of the archive
        assert result == expected
    else:
        assert (code, error.count("\n"), f"{path}: " in error) == (2, 1, True), error
