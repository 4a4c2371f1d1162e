"""`RNN`: layers of any cell."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import Parameter, init
from torch.nn.utils.rnn import PackedSequence

from fastlstm.backends import settings
from fastlstm.backends.base import WEIGHTS
from fastlstm.backends.settings import Backend
from fastlstm.cells.hints import checked_by
from fastlstm.cells.spec import Cell
from fastlstm.layers import checks, input_checks
from fastlstm.layers.modules import Words
from fastlstm.layers.packing import Lengths, Resets
from fastlstm.layers.recurrent import Recurrent, Tensors
from fastlstm.layers.typed import X, typed_as

Inputs = Mapping[str, Tensor]


class RNN(Recurrent):
    """A multi-layer recurrent network of any cell:

        rnn = fastlstm.RNN(fastlstm.cells.peephole_lstm, 3, 5)
        output, (h_n, c_n) = rnn(x)

    Args:
        cell: what a step computes: one of `fastlstm.cells`, or what `fastlstm.cell` declares.
        input_size: I, the number of input features; 0 for a cell without gates that sum x, whose values of x come as
            `inputs` of a call. Such a module has one layer. It may be without any parameter, as spiking neurons are.
        hidden_size: H, the number of hidden units.
        bias: with False there are no ``bias_ih_l*`` and ``bias_hh_l*``. The cell's params stay.
        num_layers, batch_first, dropout, bidirectional, device, dtype, backend, recompute: as in `fastlstm.LSTM`.
        heads: K, which divides H. Units 0 to H/K - 1 are the first head, and so on. The product with h, and each of the
            cell's own products, gives a unit what its own head has alone, as if the weight were block-diagonal.
            Infinity and NaN do not cross either.

    Parameters of layer k, for a cell with X gates that sum x and Y gates that sum h:
        ``weight_ih_l{k}`` (X*H, I) or (X*H, D*H) for k > 0, ``weight_hh_l{k}`` (Y*H, H/K), ``bias_ih_l{k}`` (X*H,),
        ``bias_hh_l{k}`` (Y*H,), ``{name}_l{k}`` (H,) for each of the cell's params, and ``weight_{name}_l{k}`` (H, H/K)
        for each of its products. Row blocks are in the order in which the cell declares its gates. Without gates that
        sum h, ``weight_hh_l{k}`` and ``bias_hh_l{k}`` do not exist, and without gates that sum x neither do
        ``weight_ih_l{k}`` and ``bias_ih_l{k}``. A bidirectional layer has each of them again, with ``_reverse`` at the
        end of the name. All are drawn from uniform(-1/sqrt(H), 1/sqrt(H)), with two exceptions: ``weight_hh_l{k}`` and
        weights of products have the bound 1/sqrt(H/K), and params may have initial values of the cell's. Products have
        no biases. Two of them share a weight after ``rnn.weight_b_l0 = rnn.weight_a_l0``.

    The cell is pickled as a function is, by the name of the module that declares it.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, as `torch.nn.RNN` does; for a cell that
            is none, or reads neither x nor inputs; for `heads` that do not divide H; for an unknown backend.

    Equivalent to `torch.nn.LSTM`, `torch.nn.GRU` or `torch.nn.RNN` with the cells ``lstm``, ``gru``, ``elman_tanh`` and
    ``elman_relu``, whose parameters have the same names, shapes and, for the same seed, initial values.
    """

    _words = Words("RNN", "RNN: Expected input to be 2D or 3D, got {}D tensor instead", "states", "states")
    cell: Cell
    heads = 1  # of a module that was pickled before there were any

    @checked_by(checks.check_cell_of)
    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
        backend: Backend | None = None,
        recompute: bool = False,
        heads: int = 1,
    ) -> None:
        checks.check_sizes_without_x(cell, input_size, num_layers)
        self.cell, sizes = cell, (input_size if cell.gates_of_x else 1, hidden_size, num_layers)
        # checks its arguments, and makes parameters of another cell that take no memory
        super().__init__("RNN_TANH", *sizes, bias, batch_first, dropout, bidirectional, device="meta")
        checks.check_heads(heads, hidden_size, cell)
        self.input_size, self.heads = input_size, heads
        for name in self._flat_weights_names:
            delattr(self, name)
        self.mode, self._flat_weights_names, self._all_weights = cell.name, [], []
        for layer in range(num_layers):
            for suffix in ("", "_reverse")[: 1 + bidirectional]:
                shapes = self._shapes(input_size if layer == 0 else hidden_size * (1 + bidirectional))
                names = [f"{name}_l{layer}{suffix}" for name in shapes]
                for name, shape in zip(names, shapes.values()):
                    setattr(self, name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
                self._flat_weights_names += names
                self._all_weights.append(names)
        if not self._flat_weights_names:  # a scan without weights, whose inputs must have a dtype and a device as well
            self.register_buffer("_like", torch.empty(0, device=device, dtype=dtype), persistent=False)
            self._flat_weights_names.append("_like")
        self._init_flat_weights()
        self.reset_parameters()
        self._set_backend(backend)
        self.recompute = recompute

    def _shapes(self, inputs: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's parameters by their names, in the order of a `Layer`'s weights."""
        H = self.hidden_size
        of_x, of_h = self.cell.gates_of_x * H, self.cell.gates_of_h * H
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (of_x, inputs), "weight_hh": (of_h, H // self.heads)}
        if self.bias:
            shapes |= {"bias_ih": (of_x,), "bias_hh": (of_h,)}
        shapes = {name: shape for name, shape in shapes.items() if shape[0]}
        products = {f"weight_{name}": (H, H // self.heads) for name in self.cell.products}
        return shapes | dict.fromkeys(self.cell.params, (H,)) | products

    def __setstate__(self, state: dict[str, Any]) -> None:
        if any(state["_all_weights"]):
            super().__setstate__(state)
        else:  # torch's method looks at the name of the first weight, and there is none
            torch.nn.Module.__setstate__(self, state)
            self._init_flat_weights()

    def reset_parameters(self) -> None:
        """Set all parameters to initial values, as a new module has them: see the class."""
        for name, parameter in self.named_parameters():
            own_name = name.removeprefix("parametrizations.").partition(".")[0]  # a parametrized one has more behind it
            base = own_name.rpartition("_l")[0]
            start, recurrent = self.cell.initial.get(base), ("weight_hh", *(f"weight_{a}" for a in self.cell.products))
            terms = self.hidden_size // self.heads if base in recurrent else self.hidden_size
            bound = 1.0 / math.sqrt(terms)  # as torch has it: a power of -0.5 is rounded otherwise
            if start is None:
                init.uniform_(parameter, -bound, bound)
            else:
                init.constant_(parameter, start)

    @property
    def _cell(self) -> Cell:
        return self.cell

    def _layer_weights(self, index: int) -> list[Any]:
        weights = [getattr(self, name) for name in self._all_weights[index]]
        if len(weights) < WEIGHTS + len(self.cell.params) + len(self.cell.products):
            of_x, of_h = self.cell.gates_of_x, self.cell.gates_of_h
            for k, there in enumerate((of_x, of_h, self.bias and of_x, self.bias and of_h)):
                if not there:
                    weights.insert(k, None)
        return weights

    def _example(self, weights: list[Any]) -> Any:
        given = [a for a in weights if a is not None]
        return given[0] if given else self._like

    def extra_repr(self) -> str:
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        return f"{self.cell.name}, {super().extra_repr()}{heads}"

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:  # noqa: A002
        """Raise ValueError or RuntimeError for an `input` or states of a wrong dtype or size, as `torch.nn.LSTM`."""
        self.check_input(input, batch_sizes)
        size = self.get_expected_hidden_size(input, batch_sizes)
        for k, state in enumerate(hidden):
            self.check_hidden_size(state, size, f"Expected states[{k}] size {{}}, got {{}}")

    @overload
    def forward(
        self,
        input: X,
        states: Tensors | Tensor | None = None,
        inputs: Inputs | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_states: Literal[False] = False,
    ) -> tuple[X, Tensors]: ...
    @overload
    def forward(
        self,
        input: X,
        states: Tensors | Tensor | None = None,
        inputs: Inputs | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_states: Literal[True],
    ) -> tuple[X, Tensors, tuple[X, ...]]: ...
    @overload
    def forward(
        self,
        input: Tensor | PackedSequence | None,
        states: Tensors | Tensor | None = None,
        inputs: Inputs | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]: ...
    def forward(
        self,
        input: Tensor | PackedSequence | None,  # noqa: A002
        states: Tensors | Tensor | None = None,
        inputs: Inputs | None = None,
        *,
        reset: Resets | None = None,
        lengths: Lengths | None = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run all layers over whole sequences.

        Args:
            input: (T, B, I); (B, T, I) with batch_first; (T, I) for one sequence alone; a PackedSequence; or a
                nested tensor (B, j, I) of the layout torch.jagged. None for a cell without gates that sum x: the
                `inputs` then say what T and B are. If such a cell has one input alone, that may be `input`, in the
                shape that it has in `inputs`, which is then None.
            states: a tuple in the cell's order, each (D*L, B, H), without B for one sequence alone; None for zeros. A
                tensor by itself is the state of a cell that has one.
            inputs: maps each name of the cell's inputs to a tensor (T, B, H), (B, T, H) with batch_first, (T, H) for
                one sequence alone. Any size may be 1, for a value that is the same along this dimension. For a
                PackedSequence it has the rows in the order before they were packed. A mask of booleans stands for zeros
                and ones. Every layer and direction gets the same tensors.
            reset, lengths: as in `fastlstm.LSTM.forward`.
            return_states: also return all states of the last layer.

        Returns:
            output (T, B, D*H) of the last layer in the form of `input`, a tuple of the last states, each with the shape
            of a state in `states`, and with `return_states` a tuple of all states (T, B, D*H) in the form of `input`,
            of which the first is the output. Past a row's end the others repeat the state at the end.

        Raises:
            ValueError: for the number of dimensions or dtype of `input`, names or shapes of `inputs`, the shape of
                `reset` or `lengths`, a length below 0 or beyond T, `reset` in a bidirectional module, `reset` or
                `lengths` with a PackedSequence.
            RuntimeError: for other sizes, dtypes and devices, for another number of states, and from a backend asked
                for by name that cannot run.
            TypeError: for any argument of the wrong type.
        """
        layout = "(B, T, H)" if self.batch_first else "(T, B, H)"
        x, cell_inputs = input_checks.with_only_input(self.cell, input, inputs, layout)
        if return_states is not False:
            settings.check_bool("return_states", return_states)
        output, last, *others = self._forward(x, states, reset, lengths, return_states, cell_inputs)
        return (output, last, (output, *others)) if return_states else (output, last)

    if TYPE_CHECKING:  # torch.nn.Module leaves it untyped

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def step(
        self, x_t: Tensor | None, state: Tensors | Tensor | None = None, inputs: Inputs | None = None
    ) -> tuple[Tensor, Tensors]:
        """Run one time step through all layers, for streaming. Modules of one direction only.

        Args:
            x_t: (B, I), or (I,) for one sequence alone. None for a cell without gates that sum x, or its only input.
            state: a tuple in the cell's order, each (L, B, H), without B for one sequence alone; None for zeros. A
                tensor by itself is the state of a cell that has one.
            inputs: maps each name of the cell's inputs to a tensor (B, H), or (H,) for one sequence alone. Any size may
                be 1, as in `forward`.

        Returns:
            h_t (B, H) of the last layer, and a tuple of the new states, each with the shape of a state in `state`.

        Raises:
            ValueError: for a bidirectional module, names or shapes of `inputs`, and for the number of dimensions or
                dtype of `x_t`.
            TypeError: for any argument of the wrong type.
            RuntimeError: for other sizes, dtypes and devices, as in `forward`.

        Equivalent to `forward` with T = 1. Which hooks run is as in `fastlstm.LSTM.step`.
        """
        x_t, cell_inputs = input_checks.with_only_input(self.cell, x_t, inputs, "(B, H)")
        return self._step(x_t, state, cell_inputs)
