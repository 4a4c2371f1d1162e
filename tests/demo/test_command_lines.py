"""The commands' own ways: help, versions, which model is meant, and names in any script."""

import io
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastlstm
import fastlstm.export
import fastlstm.predict
import fastlstm.train
from fastlstm.mnist import checkpoint, saved
from fastlstm.mnist.model import RowLSTM
from tests.helpers.demo import SMALL
from tests.helpers.idx import tiny_arrays, write_set

COMMANDS = {"train": fastlstm.train.main, "predict": fastlstm.predict.main, "export": fastlstm.export.main}
TRAINS = "python -m fastlstm.train trains one"
# Chinese, Arabic, Hindi, an emoji that is a sequence, mathematics to matplotlib, and a line of its own
NAMES = ("三.png", "ثلاثة.png", "तीन.png", "👩‍💻.png", r"$\frac$.png", "one\nline.png")


@pytest.mark.parametrize("main", COMMANDS.values(), ids=COMMANDS)
def test_help_ends_with_examples(capsys, main):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups, examples = text.split("\nexamples:\n")
    headings = re.findall(r"^([a-z][a-z, ]+):$", groups, re.MULTILINE)
    assert headings[0] == "options"
    assert len(headings) > 1
    _, options = re.split(r"^options:\n", groups, flags=re.MULTILINE)
    assert options.partition("\n\n")[0].count("\n") == 1  # --help and --version; what a command does is in its groups
    assert re.search(r"^    python -m fastlstm\.", examples, re.MULTILINE)
    assert max(map(len, examples.splitlines())) <= 80
    assert text.count("triton-tf32") <= 1  # long choices stand in one place


@pytest.mark.parametrize("main", COMMANDS.values(), ids=COMMANDS)
def test_version(capsys, main):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastlstm {fastlstm.__version__}\n"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (fastlstm.predict.main, (), "argument --model: runs/row-lstm: expected a model .*, found none; "),
        (fastlstm.predict.main, ("x.png",), "argument --model: runs/row-lstm: expected a model .*, found none; "),
        (fastlstm.predict.main, ("x.png", "--model", "m.pt"), "argument --model: m.pt: expected .*, found none; "),
        (fastlstm.export.main, (), "argument MODEL: must be a run's directory or its model.pt, got none; "),
        (fastlstm.export.main, ("m.pt", "out"), "argument MODEL: m.pt: expected a model .*, found none; "),
    ],
)
def test_without_a_model_it_is_said_how_to_train_one(tmp_path, monkeypatch, refused, main, arguments, message):
    monkeypatch.chdir(tmp_path)
    line = refused(main, *arguments)
    assert re.fullmatch(rf"python -m fastlstm\.(predict|export): error: {message}{TRAINS}\n", line)


@pytest.mark.parametrize("main", [fastlstm.predict.main, fastlstm.export.main], ids=["predict", "export"])
def test_a_run_without_a_model_is_trained_to_its_end(tmp_path, refused, main):
    checkpoint.save(tmp_path / "checkpoint.pt", {})
    arguments = ("x.png", "--model", tmp_path) if main is fastlstm.predict.main else (tmp_path, tmp_path / "out")
    assert f"found none; python -m fastlstm.train --resume {tmp_path} trains one" in refused(main, *arguments)


def test_with_a_model_images_are_asked_for(refused, run):
    line = refused(fastlstm.predict.main, "--model", run)
    assert "argument IMAGE: must be one or more pictures, IDX files or directories, got none" in line


def test_an_export_without_its_name_is_refused(refused, run):
    assert "argument OUT: must be the file to write" in refused(fastlstm.export.main, run)


def test_export_takes_a_run_s_directory(tmp_path, run):
    for source, name in ((run, "directory"), (run / "model.pt", "file")):
        assert fastlstm.export.main([str(source), str(tmp_path / name)]) == 0
    assert (tmp_path / "directory").read_bytes() == (tmp_path / "file").read_bytes()


class Whole(torch.nn.Module):
    """What `torch.save(model)` makes of a model needs its code to be run."""


def picture(kind):
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, kind)
    return file.getvalue()


def stored(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def script():
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), file)
    return file.getvalue()


def kept(folder):
    checkpoint.save(folder / "kept", {"state": {}})
    return (folder / "kept").read_bytes()


def exported(folder):
    saved.save(folder / "model.pt", RowLSTM(3, 4), (4, 3))
    assert fastlstm.export.main([str(folder), str(folder / "exported")]) == 0
    return (folder / "exported").read_bytes()


@pytest.mark.parametrize("main", [fastlstm.predict.main, fastlstm.export.main], ids=["predict", "export"])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (lambda folder: picture("png"), "a PNG picture"),
        (lambda folder: picture("jpeg"), "a JPEG picture"),
        (kept, r"a checkpoint, which python -m fastlstm\.train --resume .* trains to its end and makes a model of"),
        (exported, r"a model that fastlstm\.export wrote for C"),
        (lambda folder: b"{hello}", r"a file that begins with b'\{hello\}'"),
        (lambda folder: b"", "an empty file"),
        (lambda folder: stored(Whole()), "an archive that is damaged or holds more than tensors and plain values"),
        (lambda folder: script(), "an archive that is damaged or holds more than tensors and plain values"),
        (lambda folder: stored({})[:-40], "an archive that is damaged or holds more than tensors and plain values"),
        (lambda folder: stored({"weights": 1}), "an archive without config, image_size, state_dict"),
        (lambda folder: stored(torch.ones(2)), "an archive without config, image_size, state_dict"),
    ],
    ids=["png", "jpeg", "checkpoint", "export", "text", "empty", "module", "script", "cut", "dictionary", "tensor"],
)
def test_what_is_no_model_is_told_by_its_kind(tmp_path, capsys, refused, recwarn, main, content, found):
    path = tmp_path / "given"
    path.write_bytes(content(tmp_path))
    capsys.readouterr()
    recwarn.clear()
    arguments = ("x.png", "--model", path) if main is fastlstm.predict.main else (path, tmp_path / "out")
    line = refused(main, *arguments)
    expected = f"{re.escape(str(path))}: expected a model that fastlstm.train wrote, found {found}"
    assert re.fullmatch(rf".* error: argument (--model|MODEL): {expected}\n", line)
    assert "weights_only" not in line
    assert not recwarn.list


def write_picture(path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(path, "png")
    return path


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_names_in_any_script_are_drawn(tmp_path, run, name):
    path, out = write_picture(tmp_path / name), tmp_path / "out"
    assert fastlstm.predict.main([str(path), "--model", str(run), "--out", str(out)]) == 0
    assert len(list(out.iterdir())) == 1


def undecodable(folder):
    """A file whose name is no text in any encoding that the system would choose."""
    return folder / os.fsdecode(b"\xff\xfe.png")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses names that are not UTF-8")
@pytest.mark.filterwarnings("error")
def test_a_name_that_is_no_text_is_drawn(tmp_path, run, capsys):
    path, out = write_picture(undecodable(tmp_path)), tmp_path / "out"
    assert fastlstm.predict.main([str(path), "--model", str(run), "--out", str(out)]) == 0
    assert "\\udcff\\udcfe.png: " in capsys.readouterr().out
    assert len(list(out.iterdir())) == 1


def on_a_terminal_for_ascii(main, *arguments):
    """The exit code of a command, and what it printed on both streams."""
    streams = [io.TextIOWrapper(io.BytesIO(), "ascii", errors) for errors in ("strict", "backslashreplace")]
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        try:
            code = main([*map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
        for stream in streams:
            stream.flush()
    return code, *(stream.buffer.getvalue().decode("ascii") for stream in streams)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses names that are not UTF-8")
@pytest.mark.filterwarnings("error::UserWarning")
def test_names_in_any_script_are_printed_in_ascii(tmp_path, run, no_pictures):
    names = [*NAMES[:4], undecodable(tmp_path).name]
    paths = [write_picture(tmp_path / name) for name in names]
    data = write_set(tmp_path / os.fsdecode(b"\xff"), tiny_arrays())
    out = tmp_path / os.fsdecode("三".encode() + b"\xfe")
    code, told, error = on_a_terminal_for_ascii(fastlstm.predict.main, *paths, "--model", run, "--out", tmp_path / "三")
    assert (code, error) == (0, "")
    for name, line in zip(names, told.splitlines(), strict=True):
        assert name.encode("ascii", "backslashreplace").decode() + ": " in line
    assert len(list((tmp_path / "三").iterdir())) == len(names)

    code, _, error = on_a_terminal_for_ascii(fastlstm.export.main, run, tmp_path / "三.flstm")
    assert (code, error) == (0, "")
    code, _, error = on_a_terminal_for_ascii(fastlstm.export.main, run, tmp_path / "missing 三" / "out")
    assert code == 2
    assert "\\u4e09" in error

    new = ("--data", data, *SMALL, "--iterations=2", "--out", out)
    for arguments in (new, ("--resume", out)):
        code, told, error = on_a_terminal_for_ascii(fastlstm.train.main, *arguments)
        assert code == 0, error
        assert "\\u4e09\\udcfe" in told
