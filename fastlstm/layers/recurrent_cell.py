"""What the modules of one time step have in common."""

from typing import Any

import torch
from torch import Tensor, nn

from fastlstm.backends.base import Layer
from fastlstm.layers import calls
from fastlstm.layers.functional import run_cell
from fastlstm.layers.modules import CellModule


class RecurrentCell(CellModule, nn.RNNCellBase):
    """A module that runs one time step of its cell."""

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend}" if self.backend is not None else "")

    def _layer_weights(self, index: int) -> list[Any]:
        """Return the weights of the only layer, as a `Layer` has them."""
        parameters: Any = self._parameters
        try:
            return [parameters["weight_ih"], parameters["weight_hh"], parameters["bias_ih"], parameters["bias_hh"]]
        except KeyError:  # parametrized, or replaced by a plain tensor
            return [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]

    def _forward(self, x: Any, hx: Any) -> Any:
        """Return what `forward` returns, for arguments as a user gave them."""
        weights = tuple(self._layer_weights(0))
        if not torch.compiler.is_dynamo_compiling() and type(x) is Tensor:
            plans = vars(self).get("_plans")  # none before the first call
            if plans and (states := self._states_of(hx)) is not None:
                layer = Layer(x, weights, states, None, None, False, self._cell)
                _, plan = plans[0].find(layer, self.backend, False)
                if plan is not None:
                    last = plan(layer).last
                    return last[0] if self._single else tuple(last)
        plans_of_all = self._plans_of()
        given = calls.check_cell(self, x, hx, weights[0])
        if x.dim() == 2:
            last = run_cell(self._cell, x, given, weights, self.backend, plans_of_all)
        else:
            given = None if given is None else tuple([a.unsqueeze(0) for a in given])
            rows = run_cell(self._cell, x.unsqueeze(0), given, weights, self.backend, plans_of_all)
            last = tuple([a.squeeze(0) for a in rows])
        return last[0] if self._single else tuple(last)
