"""Checkpoints: one file, whole or not there, and refused by name when it is damaged or of something else.

The format: a line that says what it is and in which version, the SHA-256 sum of the rest, and what `torch.save` wrote.
"""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastlstm.files import replacing
from fastlstm.mnist.state import State

NAME = "checkpoint.pt"
MAGIC = b"fastlstm training checkpoint, version 1\n"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or foreign: the text names it, what was expected and what was found."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, of tensors and plain values, to `path`; the file there stays until the new one is whole.

    Raises:
        FileError: when it cannot be written.
    """
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path) as file:
        file.write(MAGIC + hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Return what `save` wrote to `path`, with its tensors on the CPU. No code in the file is run (weights_only).

    Raises:
        CheckpointError: when the file is missing, damaged or not a checkpoint of this version.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a checkpoint, found none ({error.strerror})") from error
    start = len(MAGIC) + hashlib.sha256().digest_size
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path}: expected a checkpoint that begins with {MAGIC!r}, found {content[:40]!r}")
    digest = hashlib.sha256(content[start:]).digest()
    if digest != content[len(MAGIC) : start]:
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, with the SHA-256 sum {content[len(MAGIC) : start].hex()}, "
            f"found {len(content) - start} bytes with {digest.hex()}"
        )
    return torch.load(io.BytesIO(content[start:]), map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Keeper:
    """Keeps a run's state in a file, and takes it up from there.

    Args:
        path: of the checkpoint.
        about: what the run is, in plain values; a checkpoint of another run is refused.
        begun: how the run was begun, kept beside it.
        every: iterations between two checkpoints.
        resume: take up what is at `path`; otherwise a file there is replaced.
    """

    path: Path
    about: dict[str, Any]
    begun: dict[str, Any] = field(default_factory=dict)
    every: int = 200
    resume: bool = False

    def keep(self, state: State) -> None:
        save(self.path, {"about": self.about, "begun": self.begun, "state": state.state_dict()})

    def take_up(self, state: State) -> None:
        """Give `state` what was kept; without a file it stays as it is.

        Raises:
            CheckpointError: when the file is damaged or of another run.
        """
        if not self.resume or not self.path.exists():
            return
        content = load(self.path)
        for name, value in self.about.items():
            if (recorded := content["about"].get(name)) != value:
                raise CheckpointError(f"{self.path}: expected a checkpoint with {name} = {value!r}, found {recorded!r}")
        state.load_state_dict(content["state"])
