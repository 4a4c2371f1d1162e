"""How files are replaced: no other file is touched, and permissions stay."""

import os
import secrets
import stat

import pytest

from fastlstm.files import FileError, replacing

needs_modes = pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")


def write(path, content=b"new"):
    with replacing(path) as file:
        file.write(content)


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@needs_modes
@pytest.mark.parametrize("umask", [0o022, 0o077], indirect=True, ids=oct)
def test_a_new_file_has_the_permissions_that_any_new_file_has(tmp_path, umask):
    write(tmp_path / "out")
    (tmp_path / "other").write_bytes(b"")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "other")]
    assert modes == [0o666 & ~umask] * 2


@needs_modes
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666], ids=oct)
@pytest.mark.parametrize("umask", [0o022], indirect=True, ids=oct)
def test_a_replaced_file_keeps_its_permissions(tmp_path, umask, mode):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@needs_modes
def test_nobody_else_can_read_a_private_file_while_it_is_written(tmp_path, monkeypatch):
    path, modes = tmp_path / "out", []
    path.touch(0o600)
    monkeypatch.setattr(os, "fsync", lambda descriptor: modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode)))
    write(path)
    assert modes == [0o600]


@pytest.mark.skipif(os.name == "nt", reason="not every user of Windows may make a link")
def test_a_link_under_the_temporary_name_leads_nowhere(tmp_path, monkeypatch):
    """Neither under a name that could be guessed, nor if somebody has guessed it."""
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"precious")
    path = tmp_path / "folder" / "out"
    path.parent.mkdir()
    path.with_name(f".out.{os.getpid()}").symlink_to(foreign)
    write(path)
    assert foreign.read_bytes() == b"precious"
    monkeypatch.setattr(secrets, "token_hex", lambda count: "guessed")
    link = path.with_name(".fastlstm-guessed.tmp")
    link.symlink_to(foreign)
    with pytest.raises(FileError, match=r"out: cannot be written \(File exists\)"):
        write(path, b"newer")
    assert (foreign.read_bytes(), path.read_bytes()) == (b"precious", b"new")
    assert link.is_symlink()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(*arguments):
        raise error

    (tmp_path / "out").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises((FileError, KeyboardInterrupt)):
        write(tmp_path / "out")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
