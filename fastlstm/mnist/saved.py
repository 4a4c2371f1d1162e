"""model.pt and checkpoint.pt: files of `torch.save`, which are whole or not there, and checked when they are read."""

import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from operator import index
from pathlib import Path
from typing import Any

import torch

from fastlstm.files import replacing
from fastlstm.mnist.data import DataError
from fastlstm.mnist.model import RowLSTM

MODEL, CHECKPOINT = "model.pt", "checkpoint.pt"
DIRECTORY = "runs/row-lstm"  # where a run is written and looked for unless another place is named


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, of tensors and plain values, to `path`; the file there stays until the new one is whole."""
    with replacing(path) as file:
        torch.save(content, file)


def read(path: Path) -> Any:
    """Return what `write` wrote to `path`, with its tensors on the CPU. No code in the file is run. A file that is
    missing or damaged raises an error of some type, which `refusing` turns into a DataError.
    """
    if not path.is_file():
        raise DataError("none")
    copy = BytesIO()  # of the parts whose checksums are right: torch checks none, and takes a part for a folder unread
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as verified:
        for name in dict.fromkeys(archive.namelist()):
            verified.writestr(zipfile.ZipInfo(name), archive.read(name))
    copy.seek(0)
    return torch.load(copy, map_location="cpu", weights_only=True)


@contextmanager
def refusing(path: Path, expected: str) -> Iterator[None]:
    """Turn an error of any type into a DataError of one line: the file at `path` is not what is `expected`."""
    try:
        yield
    except Exception as error:
        found = "a damaged file, or one of another kind"  # torch's own texts advise to run the file's code
        if isinstance(error, OSError | DataError):
            found = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: expected {expected}, found {found}") from error


def save(path: Path, model: RowLSTM, image_size: Sequence[int]) -> None:
    """Write a model to `path`, for `load`, or for `RowLSTM(**config).load_state_dict(state_dict)` of what is there."""
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    write(path, {"config": model.config, "image_size": [*image_size], "state_dict": weights})


def load(path: Path) -> tuple[RowLSTM, tuple[int, int]]:
    """Return the model that `save` wrote, and the rows and columns of its images. `path`: the file, or the directory of
    the run that wrote it. A DataError says that it is missing, damaged or no such model.
    """
    path = path / MODEL if path.is_dir() else path
    with refusing(path, "a model that python -m fastlstm.train wrote"):
        content = read(path)
        rows, columns = map(index, content["image_size"])
        model = RowLSTM(**content["config"])
        model.load_state_dict(content["state_dict"])
        if min(rows, columns) < 1 or rows * columns % model.lstm.input_size:
            raise DataError(f"one for images of {rows} x {columns} pixels, which it cannot read")
    return model.eval(), (rows, columns)
