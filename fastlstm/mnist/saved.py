"""model.pt: a trained model with what it takes to build it."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch

from fastlstm.mnist.data import DataError
from fastlstm.mnist.files import replacing
from fastlstm.mnist.model import RowLSTM

NAME = "model.pt"
DIRECTORY = "runs/row-lstm"  # where a run is looked for, and where the examples write it


def save(path: Path, model: RowLSTM, image_size: Sequence[int]) -> None:
    """For `load`, or by hand: `RowLSTM(**state["config"]).load_state_dict(state["state_dict"])`."""
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    with replacing(path) as file:
        torch.save({"config": model.config, "image_size": list(image_size), "state_dict": weights}, file)


def load(path: Path) -> tuple[RowLSTM, tuple[int, int]]:
    """The model that `save` wrote to `path`, and the rows and columns of its images; no code of the file's is run.

    Raises:
        DataError: when the file is missing, damaged or no such model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = RowLSTM(**state["config"])
        model.load_state_dict(state["state_dict"])
        rows, columns = state["image_size"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a model that fastlstm.train wrote, found none") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, TypeError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: expected a model that fastlstm.train wrote, found another ({reason})") from error
    return model.eval(), (rows, columns)
