"""model.pt and checkpoint.pt: files of `torch.save`, which are whole or not there, and checked when they are read."""

import zipfile
from collections.abc import Sequence
from io import BytesIO
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


def read(path: Path, expected: str, names: set[str]) -> dict[str, Any]:
    """Return what `write` wrote to `path`, with its tensors on the CPU. No code in the file is run. A DataError says
    that the file, which is `expected` to be something, is missing or damaged, or has other entries than these `names`.
    """
    found = "a damaged file, or one of another kind"
    if not path.is_file():
        raise DataError(f"{path}: expected {expected}, found none")
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(BytesIO(data)) as archive:
            is_whole = archive.testzip() is None  # torch.load compares no checksums
        content = torch.load(BytesIO(data), map_location="cpu", weights_only=True) if is_whole else None
    except Exception as error:  # of many kinds, and torch's texts advise to run the file's code
        reason = error.strerror if isinstance(error, OSError) else found
        raise DataError(f"{path}: expected {expected}, found {reason}") from error
    if not isinstance(content, dict) or content.keys() != names:
        raise DataError(f"{path}: expected {expected}, found {found}")
    return content


def save(path: Path, model: RowLSTM, image_size: Sequence[int]) -> None:
    """Write a model to `path`, for `load`, or for `RowLSTM(**config).load_state_dict(state_dict)` of what is there."""
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    write(path, {"config": model.config, "image_size": [*image_size], "state_dict": weights})


def load(path: Path) -> tuple[RowLSTM, tuple[int, int]]:
    """Return the model that `save` wrote, and the rows and columns of its images. `path`: the file, or the directory of
    the run that wrote it. A DataError says that it is missing, damaged or no such model.
    """
    path = path / MODEL if path.is_dir() else path
    expected = "a model that python -m fastlstm.train wrote"
    content = read(path, expected, {"config", "image_size", "state_dict"})
    try:
        rows, columns = content["image_size"]
        model = RowLSTM(**content["config"])
        model.load_state_dict(content["state_dict"])
    except Exception as error:  # of the constructors, and of load_state_dict
        raise DataError(f"{path}: expected {expected}, found one that cannot be built") from error
    return model.eval(), (rows, columns)
