"""Files that are whole or not there."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class FileError(OSError):
    """A file cannot be written: the text names it and says why."""


def is_full(error: OSError) -> bool:
    """Return whether what was written to takes no more: a file of ours, a full disk, or a pipe that nobody reads."""
    return isinstance(error, FileError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EPIPE)


@contextmanager
def replacing(path: Path) -> Iterator[io.BytesIO]:
    """Yield a buffer, whose content becomes the file at `path` at the end, whole or not at all.

    The content is written to a file of a temporary name beside `path`, which is then renamed. If anything fails, such
    as a full disk, it fails here, and the earlier file at `path` stays.

    Raises:
        FileError: when the file cannot be written.
    """
    content = io.BytesIO()
    yield content
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave the name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):  # it has been renamed, or was never there
            temporary.unlink()
