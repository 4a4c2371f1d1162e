"""`LSTMCell`: the parameters, arguments, results and errors of `torch.nn.LSTMCell`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlstm.backends import dispatch
from fastlstm.backends.base import Layer
from fastlstm.backends.dispatch import Backend
from fastlstm.cells import library
from fastlstm.layers import checks
from fastlstm.layers.functional import State, run_cell
from fastlstm.layers.recurrent import KeepsPlans


class LSTMCell(KeepsPlans, nn.RNNCellBase):
    """An LSTM cell that takes the place of `torch.nn.LSTMCell`.

    Equivalent to ``torch.nn.LSTMCell(input_size, hidden_size, bias)``: the same arguments, parameters, initial values
    for the same seed, state_dict, results and errors.

    Args:
        input_size: I, the number of input features.
        hidden_size: H, the number of hidden units.
        bias: with False, ``bias_ih`` and ``bias_hh`` are None.
        device, dtype: of the parameters.
        backend: a name of `fastlstm.backends.dispatch.NAMES`. None takes the default that `fastlstm.use_backend` sets.

    Parameters, with row blocks in the order i, f, g, o: ``weight_ih`` (4H, I), ``weight_hh`` (4H, H), ``bias_ih`` and
    ``bias_hh`` (4H,).

    Raises:
        ValueError: for an unknown backend.
    """

    backend: Backend | None = None

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
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        if backend is not None:
            dispatch.check_name(backend)
            self.backend = backend

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", backend={self.backend}" if self.backend is not None else "")

    def forward(self, input: Tensor, hx: State | None = None) -> State:  # noqa: A002
        """Run one time step.

        Args:
            input: (B, I), or (I,) for one row alone.
            hx: ``h_0`` and ``c_0``, each (B, H) or (H,); None for zeros.

        Returns:
            ``(h_1, c_1)``, each (B, H) or (H,).

        Raises:
            ValueError: for a number of dimensions other than 1 and 2.
            RuntimeError: for other sizes, dtypes and devices, and from a backend asked for by name that cannot run.
            TypeError: if `input` is no tensor, or `hx` is no tuple or list of tensors.

        Equivalent to `torch.nn.LSTMCell.forward`.
        """
        parameters: Any = self._parameters
        try:
            weights = (
                parameters["weight_ih"], parameters["weight_hh"], parameters["bias_ih"], parameters["bias_hh"]
            )  # fmt: skip
        except KeyError:  # parametrized, or replaced by a plain tensor
            weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if not torch.compiler.is_dynamo_compiling() and type(input) is Tensor and checks.is_pair(hx):
            plans = vars(self).get("_plans")  # none before the first call
            if plans:
                layer = Layer(input, weights, hx or (None, None), None, None, False, library.lstm)
                _, plan = plans[0].find(layer, self.backend, False)
                if plan is not None:
                    h, c = plan(layer).last
                    return h, c
        plans = self._plans_of()
        hx = checks.check_cell(self, input, hx, weights[0])
        if input.dim() == 2:
            return run_cell(input, hx, weights, self.backend, plans)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = run_cell(input.unsqueeze(0), hx, weights, self.backend, plans)
        return h.squeeze(0), c.squeeze(0)

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        def __call__(self, input: Tensor, hx: State | None = None) -> State: ...  # noqa: A002
