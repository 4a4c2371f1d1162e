"""A full disk: one line says what could not be written, and neither figures nor older files are lost."""

import errno
import io
import os
from contextlib import nullcontext

import pytest

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


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    assert fastlstm.train.main(["--data", str(tiny), *SHORT, "--out", str(directory)]) == 0
    return figures(directory)


@pytest.mark.parametrize("free", [0, 3, 6, 7])  # the last one is a picture's
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tiny, whole, tmp_path, full_disk, request, capsys, free):
    if free < 7:
        request.getfixturevalue("no_pictures")
    full_disk(free)
    with pytest.raises(SystemExit) as stop:
        fastlstm.train.main([*map(str, ("--data", tiny, *SHORT, "--out", tmp_path))])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert str(tmp_path) in error.splitlines()[-1]
    assert FULL in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    full_disk(10**6)
    if free:
        assert fastlstm.train.main(["--resume", str(tmp_path), "--threads", "1"]) == 0
        assert figures(tmp_path) == whole
    else:
        assert list(tmp_path.iterdir()) == []
