"""What the modules of one time step have in common."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlstm.autograd.modes import is_untransformed
from fastlstm.backends import aten, settings
from fastlstm.backends.base import new_layer
from fastlstm.backends.settings import Backend
from fastlstm.layers import input_checks
from fastlstm.layers.functional import run_cell
from fastlstm.layers.modules import CellModule
from fastlstm.layers.typed import Generic, States


class RecurrentCell(CellModule, nn.RNNCellBase, Generic[States]):
    """A module that runs one time step of its cell."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, self._cell.gates_of_x, device, dtype)
        self._set_backend(backend)

    def forward(self, input: Tensor, hx: States | None = None) -> States:  # noqa: A002
        """Run one time step.

        Args:
            input: (B, I), or (I,) for one row alone.
            hx: the states, in the form of the result; None for zeros.

        Returns:
            ``h_1`` (B, H) or (H,). An LSTM's cell returns ``(h_1, c_1)``, each of this shape.

        Raises:
            ValueError: for a number of dimensions other than 1 and 2.
            RuntimeError: for other sizes, dtypes and devices, and from a backend asked for by name that cannot run.
                An `ElmanCell` also raises it for an unknown nonlinearity.
            TypeError: if `input` is no tensor, or `hx` has not the form of states.

        Equivalent to the `forward` of torch's cell, but for the rounding of int8 modules.
        """
        states: States = self._forward(input, hx)
        return states

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        def __call__(self, input: Tensor, hx: States | None = None) -> States: ...  # noqa: A002

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
            cell, plans, backend = self._cell, self._plans, settings.default if self.backend is None else self.backend
            states = self._states_of(cell, hx)
            if (
                states is not None
                and backend == "auto"
                and aten.runs_step(cell, x, self.hidden_size)
                and is_untransformed(x, *weights, *states)
            ):
                input_checks.check_cell(self, x, hx, weights[0])
                last = aten.step(cell, x, states, weights, self.hidden_size)
                return last[0] if self._has_bare_state else last
            if plans and states is not None:
                layer = new_layer((x, weights, states, None, None, False, cell, (), (), 0, False, 1, 1))
                _, plan = plans[0].find(layer, backend, False)
                if plan is not None:
                    last = plan(layer).last
                    return last[0] if self._has_bare_state else tuple(last)
        plans_of_all = self._plans_of()
        initial = input_checks.check_cell(self, x, hx, weights[0])
        if x.dim() == 2:
            last = run_cell(self._cell, x, initial, weights, self.backend, plans_of_all)
        else:
            initial = None if initial is None else tuple([a.unsqueeze(0) for a in initial])
            rows = run_cell(self._cell, x.unsqueeze(0), initial, weights, self.backend, plans_of_all)
            last = tuple([a.squeeze(0) for a in rows])
        return last[0] if self._has_bare_state else tuple(last)
