"""A full disk: one line says what could not be written, and neither figures nor older files are lost."""

import errno
import io
import os
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

import fastlstm.export
import fastlstm.predict
import fastlstm.train
from fastlstm.backends.numba.host import kernel_files
from tests.helpers.demo import SMALL, figures

FULL = os.strerror(errno.ENOSPC)
# Checkpoints are written after 0, 2, 4, 6 and 8 iterations, then metrics.json, model.pt, and pictures
SHORT = (*SMALL, "--iterations=8", "--checkpoint-every=2")


@pytest.fixture
def full_disk(monkeypatch):
    """A function: the disk takes the first `free` files, then no more."""

    def fill(free):
        files = iter(range(10**6))

        def fsync(descriptor):
            if next(files) >= free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)

    monkeypatch.setattr(kernel_files, "replacing", lambda path: nullcontext(io.BytesIO()))  # kernels have another disk
    return fill


def stopped(main, *arguments):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    assert stop.value.code == 2


def test_a_disk_that_is_full_at_the_start_is_one_line(tiny, tmp_path, full_disk, refused):
    full_disk(0)
    line = refused(fastlstm.train.main, "--data", tiny, *SHORT, "--out", tmp_path)
    assert str(tmp_path / "checkpoint.pt") in line
    assert FULL in line
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    assert fastlstm.train.main(["--data", str(tiny), *SHORT, "--out", str(directory)]) == 0
    return figures(directory)


@pytest.mark.parametrize("free", [1, 3, 5, 6, 7])  # the last one is a picture's
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tiny, whole, tmp_path, full_disk, request, capsys, free):
    if free < 7:
        request.getfixturevalue("no_pictures")
    full_disk(free)
    stopped(fastlstm.train.main, "--data", tiny, *SHORT, "--out", tmp_path)
    full_disk(10**6)
    error = capsys.readouterr().err
    assert FULL in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert fastlstm.train.main(["--resume", str(tmp_path), "--threads", "1"]) == 0
    assert figures(tmp_path) == whole


def test_pictures_that_cannot_be_written_leave_what_is_read(tmp_path, run, full_disk, capsys):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.fromarray(np.eye(28, dtype=np.uint8) * 255).save(path)
    full_disk(1)
    out = tmp_path / "out"
    stopped(fastlstm.predict.main, *paths, "--model", run, "--out", out)
    streams = capsys.readouterr()
    assert [line.partition(":")[0] for line in streams.out.splitlines()] == [str(path) for path in paths]
    assert str(out / "2-b.png.reading.png") in streams.err
    assert FULL in streams.err
    assert [path.name for path in out.iterdir()] == ["1-a.png.reading.png"]


def test_an_export_that_cannot_be_written_leaves_the_old_one(tmp_path, run, full_disk, refused):
    out = tmp_path / "row_lstm.flstm"
    out.write_bytes(b"old")
    full_disk(0)
    line = refused(fastlstm.export.main, run, out)
    assert str(out) in line
    assert FULL in line
    assert out.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {out.name}
