"""Everything that changes while a model trains: its history too, and the checkpoint that keeps it all."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastlstm.mnist import saved
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.recipe import Recipe

AVERAGE_DECAY = 0.999


@dataclass
class History:
    """Losses and accuracies of the iterations done, each on its batch and before its step."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)  # accuracies by iterations done, an epoch apart
    seconds: float = 0.0  # of training
    interrupted: bool = False

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("loss", "accuracy", "validation", "seconds")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. What it cannot have returned raises an error of some type."""
        pairs = [*zip(state["loss"], state["accuracy"], strict=True)]
        self.loss, self.accuracy = [float(loss) for loss, _ in pairs], [float(accuracy) for _, accuracy in pairs]
        self.validation = {int(done): float(accuracy) for done, accuracy in state["validation"].items()}
        self.seconds = float(state["seconds"])


class State:
    """A model in training, with its optimiser, the average of its weights and its history."""

    def __init__(self, model: RowLSTM, recipe: Recipe):
        self.model, self.recipe, self.history = model, recipe, History()
        self.done = 0  # iterations
        self.optimizer = torch.optim.Adam(model.parameters(), recipe.lr, fused=True)  # a third of foreach's time
        self.average = AveragedModel(model, multi_avg_fn=_blend) if "average" in recipe.parts else None

    @property
    def tested(self) -> RowLSTM:
        """The model to evaluate: with the averaged weights, if there are any."""
        return self.model if self.average is None else cast(RowLSTM, self.average.module)

    def step(self) -> None:
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. What it cannot have returned raises an error of some type."""
        self.history.load_state_dict(state["history"])
        self.done = len(self.history.loss)
        for parameter in self.model.parameters():  # Adam's state is there to be filled after a first step
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        saved.fill(self.state_dict(), state, "state")

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average, "history": self.history}
        return {name: part for name, part in parts.items() if part is not None}


def _blend(averaged: Any, current: Any, blended: Any) -> None:
    """Average the weights, with less decay than AVERAGE_DECAY at first, so that the initial weights soon fade."""
    decay = min(AVERAGE_DECAY, (1 + int(blended)) / (10 + int(blended)))
    get_ema_multi_avg_fn(decay)(averaged, current, blended)


@dataclass
class Checkpoint:
    """The file at `path` that keeps a run. Its `content` has what the run is about, and under "states" the state of
    each LSTM by name: {} where it has not begun. `every` are the iterations between two writings.
    """

    path: Path
    content: dict[str, Any]
    every: int = 200

    def keep(self, name: str, state: State) -> None:
        """Write the file, with the state of the model `name`; a FileError says that it cannot be written."""
        self.content["states"][name] = state.state_dict()
        saved.write(self.path, self.content)

    def take_up(self, name: str, state: State) -> None:
        """Give `state` what was kept of the model `name`, if it has begun. A state that does not fit is a DataError."""
        with saved.refusing(self.path, "a checkpoint of this recipe"):
            if kept := self.content["states"][name]:
                state.load_state_dict(kept)
