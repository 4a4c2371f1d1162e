"""Checkpoints and models: a run that was cut short continues bit for bit, and a damaged file is refused by name."""

import copy
import io
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from functools import reduce
from operator import getitem

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import fastlstm.export
import fastlstm.predict
import fastlstm.train
from fastlstm.mnist import pictures, saved
from fastlstm.mnist.recipe import PARTS, Recipe
from fastlstm.mnist.state import Checkpoint
from tests.helpers.demo import PNG, SMALL, figures
from tests.helpers.idx import TEST_IMAGES, tiny_arrays, write_set

pytestmark = pytest.mark.usefixtures("no_pictures")
EXTERNAL_ATTR = 38  # offset in an entry of a ZIP archive's directory
REMOVED = object()
OPTIONS = (*SMALL, "--lr=0.004", "--parts", *PARTS)
DEEP = ("--layers", "2", "--dropout", "0.3", "--bidirectional")


def weights(directory):
    return torch.load(directory / "model.pt", weights_only=True)["state_dict"]


def iterations_in(path):
    state = torch.load(path, weights_only=True)["states"]["fastlstm.LSTM"]
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
    saved.write(path, {"about": Trap(), "config": Trap()})
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


@st.composite
def without_an_entry(draw, content):
    """A file that lacks one entry of the `content`, or of what it keeps of the model in training."""
    changed = copy.deepcopy(content)
    inside = draw(st.sampled_from([changed, *changed.get("states", {}).values()]).filter(bool))
    del inside[draw(st.sampled_from([*inside]))]
    file = io.BytesIO()
    torch.save(changed, file)
    return file.getvalue()


FOREIGN = st.sampled_from([b"", PNG, b"PK\x03\x04" + b"\0" * 40]) | st.binary(max_size=200)


@pytest.mark.parametrize(
    "content",
    [
        {"about": 1, "data": "", "states": {}},
        {"about": {}, "data": "", "states": {}},
        {"about": {"recipe": {}, "backend": "numba", "compare": False}, "data": 1, "states": {}},
    ],
)
def test_a_checkpoint_with_other_contents(tmp_path, content):
    saved.write(tmp_path / "checkpoint.pt", content)
    code, error, _ = outcome("train", tmp_path)
    assert (code, error.count("\n"), f"{tmp_path / 'checkpoint.pt'}: " in error) == (2, 1, True)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("backend", "", "backend: invalid choice: ''"),
        ("compare", "x", "compare: ignored explicit argument 'x'"),
        ("parts", 1, "parts: invalid choice: '1'"),
        ("parts", ("average", "--version"), "parts: invalid choice: '--version'"),
        ("hidden_size", 0, "hidden-size: must be a whole number from 1 to 2147483647, got '0'"),
        ("lr", torch.ones(2), "lr: must be a number above 0, got 'tensor([1., 1.])'"),
    ],
)
def test_an_entry_of_a_checkpoint_that_no_run_has_is_named(tmp_path, entry, value, said):
    about = {"recipe": asdict(Recipe()), "backend": "numba", "images": 0, "compare": False}
    (about if entry in about else about["recipe"])[entry] = value
    saved.write(tmp_path / "checkpoint.pt", {"about": about, "data": "", "states": {}})
    code, error, _ = outcome("train", tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert f"argument --resume: {tmp_path / 'checkpoint.pt'}: argument --{said}" in error


def copied(directory, target, change):
    """The path of a copy of a run's checkpoint in `target`, beside its other files, after `change` of its content."""
    shutil.copytree(directory, target, dirs_exist_ok=True)
    path = target / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    change(content)
    saved.write(path, content)
    return path


@pytest.mark.parametrize(
    "damage", [{"loss": "abcd"}, {"accuracy": [0.5]}, {"validation": [1]}, {"validation": {2: "x"}}, {"seconds": "x"}]
)
def test_a_history_that_no_run_has(finished, tmp_path, damage):
    path = copied(finished, tmp_path, lambda content: content["states"]["fastlstm.LSTM"]["history"].update(damage))
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


STATE = "states", "fastlstm.LSTM"
OPTIMIZER = *STATE, "optimizer"
ADAM = *OPTIMIZER, "state", 0


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ((*ADAM, "exp_avg"), torch.zeros(1), "optimizer.state.0.exp_avg must be a tensor of torch.float32 (28, 3)"),
        ((*ADAM, "exp_avg"), torch.zeros(0), "not a tensor of torch.float32 (0,)"),
        ((*ADAM, "exp_avg"), torch.zeros(28, 3, device="meta"), "a damaged file"),
        ((*ADAM, "exp_avg"), torch.zeros(28, 3).to_sparse(), "a damaged file"),
        ((*ADAM, "exp_avg_sq"), torch.zeros(28, 3).double(), "not a tensor of torch.float64 (28, 3)"),
        ((*ADAM, "exp_avg_sq"), REMOVED, "optimizer.state.0 must be a dict of exp_avg, exp_avg_sq, step, not"),
        ((*ADAM, "step"), "text", "optimizer.state.0.step must be a tensor of torch.float32 (), not 'text'"),
        ((*ADAM, "step"), 4, "not 4"),
        ((*ADAM, "step"), torch.zeros(1), "not a tensor of torch.float32 (1,)"),
        ((*ADAM, "max_exp_avg_sq"), torch.zeros(28, 3), "not a dict of exp_avg, exp_avg_sq, max_exp_avg_sq, step"),
        (ADAM, REMOVED, "optimizer.state must be a dict of 0, 1, 2, 3, 4, 5, not a dict of 1, 2, 3, 4, 5"),
        ((*OPTIMIZER, "state"), {}, "optimizer.state must be a dict of 0, 1, 2, 3, 4, 5, not a dict of"),
        ((*OPTIMIZER, "param_groups", 0, "amsgrad"), True, "param_groups.0.amsgrad must be False, not True"),
        ((*OPTIMIZER, "param_groups", 0, "lr"), torch.ones(9), "param_groups.0.lr must be 0.004, not a tensor"),
        ((*OPTIMIZER, "param_groups", 0, "params"), [0], "param_groups.0.params must be a list of 6, not a list of 1"),
        ((*OPTIMIZER, "param_groups"), [], "optimizer.param_groups must be a list of 1, not a list of 0"),
        (
            (*STATE, "model", "linear.bias"),
            torch.zeros(1),
            "model.linear.bias must be a tensor of torch.float32 (10,), not",
        ),
        ((*STATE, "average", "n_averaged"), 4.0, "average.n_averaged must be a tensor of torch.int64 (), not 4.0"),
        (("about", "images"), torch.ones(2), "about.images must be "),
        (("about", "recipe", "steps"), -1, "steps: must be a whole number"),
        ((*STATE, "history", "loss"), (1.0,) * 4, "history.loss must be a list of 4, not (1.0, 1.0, 1.0, 1.0)"),
    ],
)
def test_a_part_of_a_checkpoint_that_no_run_has_is_named(finished, tmp_path, entry, value, said):
    def change(content):
        *path, last = entry
        inside = reduce(getitem, path, content)
        if value is REMOVED:
            del inside[last]
        else:
            inside[last] = value

    path = copied(finished, tmp_path, change)
    code, error, _ = outcome("train", tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert f"argument --resume: {path}: " in error
    assert said in error


def test_tensors_of_any_strides_are_taken(finished, tmp_path):
    """Adam writes to its tensors as if their numbers lay side by side."""

    def change(content):
        state = content["states"]["fastlstm.LSTM"]
        for name in ("loss", "accuracy"):
            del state["history"][name][2:]  # two iterations are left to do
        for each in state["optimizer"]["state"].values():
            each["exp_avg"] = torch.zeros(()).expand(each["exp_avg"].shape)
            each["exp_avg_sq"] = torch.ones(2 * len(each["exp_avg"]), *each["exp_avg"].shape[1:])[::2]

    copied(finished, tmp_path, change)
    code, _, result = outcome("train", tmp_path)
    assert (code, result["iterations"], len(result["loss"])) == (0, 4, 4)


@pytest.mark.parametrize("command", FILES)
@given(data=st.data())
@settings(max_examples=25)
def test_a_damaged_file_is_named_in_one_line(finished, command, data):
    path = finished / FILES[command]
    whole = path.read_bytes()
    try:  # a run that goes on writes the file anew, and a draw may end the test
        _, _, expected = outcome(command, finished)
        damages = st.one_of(flipped(whole), without_an_entry(torch.load(io.BytesIO(whole), weights_only=True)), FOREIGN)
        path.write_bytes(data.draw(damages))
        code, error, result = outcome(command, finished)
    finally:
        path.write_bytes(whole)
    if code == 0:  # the damage lies in bytes that hold no value, such as the gaps of the archive
        assert result == expected
    else:
        assert (code, error.count("\n"), f"{path}: " in error) == (2, 1, True), error
