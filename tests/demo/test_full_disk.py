"""A full disk: one line says what could not be written, and neither figures nor older files are lost."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastlstm.export
import fastlstm.predict
import fastlstm.train
from tests.helpers import ROOT
from tests.helpers.demo import SMALL, figures

SHORT = (*SMALL, "--iterations=8")
FULL = "cannot be written (No space left on device)"
needs_full = pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs a device that is always full, as on Linux"
)


@pytest.fixture
def full_disk(monkeypatch):
    """A function: the disk takes the first `free` files, then no more; or all after `until` of them again."""

    def fill(free, until=None):
        files = iter(range(10**6))

        def fsync(descriptor):
            number = next(files)
            if number >= free and (until is None or number < until):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)

    return fill


def last_line(text):
    return text.splitlines()[-1]


def stopped(main, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code == 2


def test_a_disk_that_is_full_at_the_start_is_one_line(tiny, tmp_path, full_disk, refused):
    full_disk(0)
    line = refused(fastlstm.train.main, "--data", tiny, *SHORT, "--out", tmp_path)
    assert line == f"python -m fastlstm.train: error: {tmp_path / 'checkpoint.pt'}: {FULL}\n"
    assert list(tmp_path.iterdir()) == []


# Checkpoints are written after 0, 2, 4, 6 and 8 iterations, then metrics.json, model.pt, and pictures
LENGTHS = ("--checkpoint-every", "2")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    assert fastlstm.train.main(["--data", str(tiny), *SHORT, *LENGTHS, "--out", str(directory)]) == 0
    return figures(directory)


@pytest.mark.parametrize(
    ("free", "until", "written"),
    [(1, None, False), (3, None, False), (3, 4, True), (5, None, False), (6, None, True), (7, None, True)],
)
def test_a_disk_that_fills_up_loses_nothing(tiny, whole, tmp_path, full_disk, request, capsys, free, until, written):
    if free < 7:  # or a picture is what does not fit
        request.getfixturevalue("no_pictures")
    full_disk(free, until)
    stopped(fastlstm.train.main, "--data", tiny, *SHORT, *LENGTHS, "--out", tmp_path)
    full_disk(10**6)
    streams = capsys.readouterr()
    done = min(2 * free, 8)
    assert re.search(rf"^iterations +{done}\b", streams.out, re.MULTILINE)
    assert last_line(streams.err).endswith(f"{FULL}; continue with --resume {tmp_path}")
    assert "Traceback" not in streams.err
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "metrics.json").exists() == written
    if written:
        assert figures(tmp_path)["loss"] == whole["loss"][:done]
    assert fastlstm.train.main(["--resume", str(tmp_path)]) == 0
    assert figures(tmp_path) == whole


def test_a_comparison_that_cannot_begin_leaves_the_first_run_s_figures(tiny, tmp_path, full_disk, capsys):
    full_disk(2, until=3)  # of the first run's checkpoints there are two
    stopped(fastlstm.train.main, "--data", tiny, *SHORT, "--compare", "--out", tmp_path)
    assert f"checkpoint-compare.pt: {FULL}; continue with --resume {tmp_path}\n" in capsys.readouterr().err
    metrics = figures(tmp_path)
    assert (metrics["iterations"], metrics["interrupted"]) == (8, False)
    assert metrics["compare"]["iterations"] == 0


@pytest.mark.parametrize(
    ("method", "reported", "interrupted"),
    [("__init__", False, None), ("add_scalar", True, True), ("close", True, False)],
)
def test_a_log_for_tensorboard_that_cannot_be_written_loses_no_figures(
    tiny, tmp_path, monkeypatch, no_pictures, capsys, method, reported, interrupted
):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs the package tensorboard")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorboard.SummaryWriter, method, full)
    out, board = tmp_path / "run", tmp_path / "board"
    stopped(fastlstm.train.main, "--data", tiny, *SHORT, "--out", out, "--tensorboard", board)
    streams = capsys.readouterr()
    assert f"python -m fastlstm.train: error: {board}: {FULL}" in last_line(streams.err)
    assert "Traceback" not in streams.err
    assert (out / "metrics.json").exists() == reported
    if reported:  # of the iterations whose log failed, too
        assert len(figures(out)["loss"]) == figures(out)["iterations"] > 0
        assert figures(out)["interrupted"] == interrupted


WITHOUT_PICTURES = """
import runpy
from fastlstm.mnist import report
report.draw = lambda *arguments: {}
runpy.run_module("fastlstm.train", run_name="__main__", alter_sys=True)
"""


def train(tiny, out, *how, **streams):
    command = [sys.executable, *how, "--data", str(tiny), *SHORT, "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, text=True, timeout=300, **streams)


@needs_full
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_standard_output_on_a_full_disk_loses_no_file(tiny, tmp_path, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        streams = {"stdout": full, "stderr": subprocess.PIPE}
        done = train(tiny, tmp_path, "-c", WITHOUT_PICTURES, **streams, env=environment)
    assert done.returncode == 2
    message = f"standard output: {FULL}"
    assert last_line(done.stderr) == f"python -m fastlstm.train: error: {message}"
    assert "Traceback" not in done.stderr
    assert figures(tmp_path)["iterations"] == 8


@needs_full
def test_progress_on_a_full_disk_is_not_shown(tiny, tmp_path):
    with open("/dev/full", "w") as full:
        done = train(tiny, tmp_path, "-c", WITHOUT_PICTURES, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0
    assert f"metrics.json, model.pt and the pictures are in {tmp_path}" in done.stdout
    assert (figures(tmp_path)["iterations"], figures(tmp_path)["interrupted"]) == (8, False)


def test_pictures_that_cannot_be_written_leave_what_is_read(tmp_path, run, full_disk, capsys):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(path)
    full_disk(1)
    out = tmp_path / "out"
    stopped(fastlstm.predict.main, *paths, "--model", run, "--out", out)
    streams = capsys.readouterr()
    assert [line.partition(":")[0] for line in streams.out.splitlines()] == [str(path) for path in paths]
    assert streams.err == f"python -m fastlstm.predict: error: {out / 'b.png.reading.png'}: {FULL}\n"
    assert [path.name for path in out.iterdir()] == ["a.png.reading.png"]


def test_an_export_that_cannot_be_written_leaves_the_old_one(tmp_path, run, full_disk, refused):
    out = tmp_path / "row_lstm.flstm"
    out.write_bytes(b"old")
    full_disk(0)
    assert refused(fastlstm.export.main, run, out) == f"python -m fastlstm.export: error: {out}: {FULL}\n"
    assert out.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {out.name}
