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
        return {**{name: part.state_dict() for name, part in self._parts().items()}, "history": vars(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = History(**state["history"])
        self.done = len(self.history.loss)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}


def _blend(averaged: Any, current: Any, blended: Any) -> None:
    """Average the weights, with less decay than AVERAGE_DECAY at first, so that the initial weights soon fade."""
    decay = min(AVERAGE_DECAY, (1 + int(blended)) / (10 + int(blended)))
    get_ema_multi_avg_fn(decay)(averaged, current, blended)


@dataclass
class Checkpoint:
    """The file at `path` that keeps a run. Its `content` has what the run is about, and under "states" the state of
    each LSTM that has begun, by name. `every` are the iterations between two writings.
    """

    path: Path
    content: dict[str, Any]
    every: int = 200

    def keep(self, name: str, state: State) -> None:
        """Write the file, with the state of the model `name`; a FileError says that it cannot be written."""
        self.content["states"][name] = state.state_dict()
        saved.write(self.path, self.content)

    def take_up(self, name: str, state: State) -> None:
        """Give `state` what was kept of the model `name`, if it has begun."""
        if name in self.content["states"]:
            state.load_state_dict(self.content["states"][name])
