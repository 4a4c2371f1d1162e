"""The commands' own ways: help, versions, which model is meant, and names in any script."""

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

import fastlstm
import fastlstm.export
import fastlstm.predict
import fastlstm.train
from tests.helpers.demo import SMALL
from tests.helpers.idx import tiny_arrays, write_set

COMMANDS = {"train": fastlstm.train.main, "predict": fastlstm.predict.main, "export": fastlstm.export.main}
# Chinese, Arabic, Hindi, an emoji that is a sequence, mathematics to matplotlib, and a line of its own
NAMES = ("三.png", "ثلاثة.png", "तीन.png", "👩‍💻.png", r"$\frac$.png", "one\nline.png")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_and_the_version_is_the_packages(capsys, name):
    for argument in ("--help", "--version"):
        with pytest.raises(SystemExit) as stop:
            COMMANDS[name]([argument])
        assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.endswith(f"fastlstm {fastlstm.__version__}\n")
    assert f"\n    python -m fastlstm.{name} " in text[text.index("\nexamples:\n") :]


@pytest.mark.parametrize(
    ("main", "arguments", "argument"),
    [
        (fastlstm.predict.main, (), "IMAGE"),
        (fastlstm.predict.main, ("x.png",), "--model: runs/row-lstm: "),
        (fastlstm.predict.main, ("x.png", "--model", "m.pt"), "--model: m.pt: "),
        (fastlstm.export.main, (), "MODEL, OUT"),
        (fastlstm.export.main, ("m.pt",), "OUT"),
        (fastlstm.export.main, ("m.pt", "out"), "MODEL: m.pt: "),
    ],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, refused, main, arguments, argument):
    monkeypatch.chdir(tmp_path)
    line = refused(main, *arguments)
    assert argument in line
    assert ("python -m fastlstm.train" in line) == argument.endswith(": ")  # where there is no model, this makes one


def test_export_takes_a_run_s_directory(tmp_path, run):
    for source, name in ((run, "directory"), (run / "model.pt", "file")):
        assert fastlstm.export.main([str(source), str(tmp_path / name)]) == 0
    assert (tmp_path / "directory").read_bytes() == (tmp_path / "file").read_bytes()


def write_picture(path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(path, "png")
    return path


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS refuses names that are not UTF-8")
@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_drawn(tmp_path, run, capsys):
    names = [*NAMES, os.fsdecode(b"\xff\xfe.png"), f"{'n' * 250}.png"]
    paths, out = [write_picture(tmp_path / name) for name in names], tmp_path / "out"
    assert fastlstm.predict.main([*map(str, paths), "--model", str(run), "--out", str(out)]) == 0
    assert "\\udcff\\udcfe.png: " in capsys.readouterr().out
    assert len(list(out.iterdir())) == len(names)


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
def test_names_in_any_script_are_printed_in_ascii(tmp_path, run, no_pictures):
    names = [*NAMES[:4], os.fsdecode(b"\xff\xfe.png")]
    paths = [write_picture(tmp_path / name) for name in names]
    code, told, error = on_a_terminal_for_ascii(fastlstm.predict.main, *paths, "--model", run)
    assert (code, error) == (0, "")
    for name, line in zip(names, told.splitlines(), strict=True):
        assert name.encode("ascii", "backslashreplace").decode() + ": " in line

    code, _, error = on_a_terminal_for_ascii(fastlstm.export.main, run, tmp_path / "三.flstm")
    assert (code, error) == (0, "")
    code, _, error = on_a_terminal_for_ascii(fastlstm.export.main, run, tmp_path / "missing 三" / "out")
    assert code == 2
    assert "\\u4e09" in error

    data = write_set(tmp_path / os.fsdecode(b"\xff"), tiny_arrays())
    out = tmp_path / os.fsdecode("三".encode() + b"\xfe")
    for arguments in (("--data", data, *SMALL, "--iterations=2", "--out", out), ("--resume", out)):
        code, told, error = on_a_terminal_for_ascii(fastlstm.train.main, *arguments)
        assert code == 0, error
        assert "\\u4e09\\udcfe" in told
