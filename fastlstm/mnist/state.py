"""Everything that changes while a model trains, so that training can be interrupted and resumed."""

from typing import Any, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastlstm.mnist.data import Batches
from fastlstm.mnist.history import History
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.recipe import AVERAGE_DECAY, Recipe


class State:
    """A model in training: its optimiser, its place in the data, its random numbers and its history."""

    def __init__(self, model: RowLSTM, recipe: Recipe, images: int, device: torch.device):
        self.model = model
        self.optimizer = recipe.optimizer(model.parameters())
        self.schedule = recipe.schedule(self.optimizer)
        self.average = None
        if "average" in recipe.parts:
            self.average = AveragedModel(model, multi_avg_fn=_blend)
        self.batches = Batches(images, recipe.batch_size, torch.Generator().manual_seed(recipe.seed), device)
        # not the batches' generator, and the same for any device and number of processes
        self.chances = torch.Generator().manual_seed(recipe.seed ^ 0x5EED)
        self.history = History(recipe.batch_size)

    @property
    def tested(self) -> RowLSTM:
        """Return the model to evaluate: with the averaged weights, if there are any."""
        return self.model if self.average is None else cast(RowLSTM, self.average.module)

    def step(self) -> None:
        """Do a step of the optimiser, the schedule and the average."""
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "chances": self.chances.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.chances.set_state(state["chances"])

    def _parts(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "average": self.average,
            "batches": self.batches,
            "history": self.history,
        }
        return {name: part for name, part in parts.items() if part is not None}


def _blend(averaged: Any, current: Any, blended: Any) -> None:
    """Average the weights, with less decay than AVERAGE_DECAY at first, so that the initial weights soon fade."""
    decay = min(AVERAGE_DECAY, (1 + int(blended)) / (10 + int(blended)))
    get_ema_multi_avg_fn(decay)(averaged, current, blended)
