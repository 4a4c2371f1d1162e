"""model.pt: a trained model with what it takes to build it."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from fastlstm.files import replacing
from fastlstm.mnist import checkpoint
from fastlstm.mnist.data import DataError
from fastlstm.mnist.model import RowLSTM

NAME = "model.pt"
DIRECTORY = "runs/row-lstm"  # where a run is written and looked for unless another place is named
ARCHIVE = b"PK\x03\x04"  # how a file of torch.save begins, a zip archive
KINDS = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\0\0\x08": "an IDX file",
    b"\x1f\x8b": "a gzip file",
    b"fastlstm training checkpoint": "a checkpoint, which {resume} trains to its end and makes a model of",
    b"fastlstm": "a model that fastlstm.export wrote for C",
}


def save(path: Path, model: RowLSTM, image_size: Sequence[int]) -> None:
    """Write the model to `path`, for `load`.

    Without `load` it is read by `RowLSTM(**state["config"]).load_state_dict(state["state_dict"])`.

    Raises:
        FileError: when the file cannot be written.
    """
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    with replacing(path) as file:
        torch.save({"config": model.config, "image_size": list(image_size), "state_dict": weights}, file)


def load(path: Path) -> tuple[RowLSTM, tuple[int, int]]:
    """Return the model that `save` wrote, and the rows and columns of its images; no code of the file's is run.

    Args:
        path: the file, or the directory of the run that wrote it.

    Raises:
        DataError: when the file is missing, damaged or no such model.
    """
    path = path / NAME if path.is_dir() else path
    expected = f"{path}: expected a model that fastlstm.train wrote, found"
    resume = f"python -m fastlstm.train --resume {path.parent}"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        unfinished = path.name == NAME and (path.parent / checkpoint.NAME).exists()
        train = resume if unfinished else "python -m fastlstm.train"
        raise DataError(f"{expected} none; {train} trains one") from error
    except OSError as error:
        raise DataError(f"{expected} none that can be read ({error.strerror})") from error
    if not content.startswith(ARCHIVE):
        kinds = (kind.format(resume=resume) for start, kind in KINDS.items() if content.startswith(start))
        begins = f"a file that begins with {content[:20]!r}" if content else "an empty file"
        raise DataError(f"{expected} {next(kinds, begins)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, and torch's texts advise to run the file's code
        raise DataError(f"{expected} an archive that is damaged or holds more than tensors and plain values") from error
    fields = ("config", "image_size", "state_dict")
    if not isinstance(state, dict) or not state.keys() >= {*fields}:
        raise DataError(f"{expected} an archive without {', '.join(fields)}")
    try:
        model = RowLSTM(**state["config"])
        model.load_state_dict(state["state_dict"])
        rows, columns = state["image_size"]
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{expected} another ({reason})") from error
    return model.eval(), (rows, columns)
