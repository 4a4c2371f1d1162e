"""Files that are whole or not there."""

import errno
import io
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FileError(OSError):
    """A file cannot be written: the text names it and says why."""


def read(path: Path, most_bytes: int) -> bytes:
    """Return the content of a file. Raise OSError for one of more bytes, and for a folder, a pipe or a device, without
    waiting for what writes to it.
    """
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return file.read()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


@contextmanager
def replacing(path: Path) -> Iterator[io.BytesIO]:
    """Yield a buffer, whose content becomes the file at `path` at the end, whole or not at all. It is written to a
    temporary file beside `path`, of a name that cannot be guessed, and renamed; the earlier file's permissions stay.

    Raises FileError when the file cannot be written, as on a full disk. The earlier file at `path` stays.
    """
    content = io.BytesIO()
    yield content
    temporary = path.with_name(f".fastlstm-{secrets.token_hex(8)}.tmp")
    try:
        earlier = _permissions(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # which follows no link
        descriptor = os.open(temporary, flags, 0o666 if earlier is None else earlier)  # less the bits of the umask
        try:
            with open(descriptor, "wb") as file:
                if earlier is not None and sys.platform != "win32":
                    os.fchmod(descriptor, earlier)
                file.write(content.getbuffer())
                file.flush()
                os.fsync(descriptor)  # a power cut must not leave the name on an empty file
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror})") from error


def _permissions(path: Path) -> int | None:
    """Return the permissions of the file at `path`, or None if there is none."""
    try:
        return stat.S_IMODE(path.stat().st_mode) & 0o777
    except OSError:  # also where a link leads to nothing
        return None
