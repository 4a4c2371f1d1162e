"""Checks of a module's options, and of lengths and resets. `input_checks` checks inputs and states."""

import inspect
from typing import Any

import torch
from torch import Tensor

from fastlstm.cells.library import CELLS
from fastlstm.cells.spec import Cell


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Raise RuntimeError unless `batch_sizes` can belong to a PackedSequence whose data has `rows` rows."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the values are not known
        return
    sizes = batch_sizes.tolist() if batch_sizes.dim() == 1 and batch_sizes.dtype is torch.int64 else [-1]
    if not sizes or sizes[-1] < 0 or sum(sizes) != rows or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(
            "batch_sizes of a PackedSequence must be int64, must not increase, and must sum up to the rows of its "
            f"data, {rows}, got {batch_sizes.dtype} {batch_sizes.tolist()}"
        )


def check_lengths(lengths: Any, batch: tuple[int, ...], steps: int | None) -> None:
    """Raise unless `lengths` is integer (B,), or () for unbatched input, within `steps` if it can be read."""
    integers = "lengths must be integers of shape (B,), as a tensor, an array or a list"
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{integers}, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{integers}, got {lengths.dtype}")
    if lengths.shape != batch:
        raise ValueError(f"lengths must have shape (B,) = {batch}, got {tuple(lengths.shape)}")
    if steps is not None:
        values = lengths.tolist() if batch else [lengths.item()]
        if values and (min(values) < 0 or max(values) > steps):
            wrong = next(n for n in values if not 0 <= n <= steps)
            raise ValueError(f"lengths must be from 0 to T = {steps}, got {wrong}")


def check_reset(reset: Any, steps: tuple[int, ...], layout: str, bidirectional: bool) -> None:
    """Raise unless `reset` is a boolean tensor of shape `steps`, called `layout`, and the module has one direction."""
    booleans = f"reset must be booleans of shape {layout}, as a tensor, an array or a list"
    if bidirectional:
        raise ValueError("reset needs a module of one direction, and this one is bidirectional")
    if not isinstance(reset, Tensor):
        raise TypeError(f"{booleans}, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"{booleans}, got {reset.dtype}: a tensor's reset.bool() has them")
    if reset.shape != steps:
        raise ValueError(f"reset must have shape {layout} = {steps}, got {tuple(reset.shape)}")


def check_no_masks(reset: Any, lengths: Any, kind: str = "PackedSequence") -> None:
    """Raise ValueError if a PackedSequence, or another `kind` of input, came with `reset` or `lengths`."""
    for name, value in (("reset", reset), ("lengths", lengths)):
        if value is not None:
            raise ValueError(f"{name} must be None for a {kind}, which carries its own lengths")


def check_forget_bias(forget_bias: Any, bias: bool) -> float:
    """Return `forget_bias` as a float. Raise TypeError if it is no real number, ValueError if there are no biases."""
    if isinstance(forget_bias, bool) or not isinstance(forget_bias, int | float):
        raise TypeError(f"forget_bias should be a number or None, got: {type(forget_bias).__name__}")
    if not bias:
        raise ValueError(f"forget_bias needs bias=True, got forget_bias={forget_bias} and bias=False")
    return float(forget_bias)


def check_probability(name: str, value: Any) -> None:
    """Raise unless `value` is a number from 0 to 1: TypeError if it is no real number, ValueError for another one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number from 0 to 1, got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {value}")


def check_option(name: str, value: Any, module: Any) -> None:
    """Raise ValueError if `recompute` or a regulariser is wanted of a module that cannot have it."""
    if module.proj_size:
        size = module.proj_size
        raise ValueError(f"{name} needs a module without projection, got {name}={value} and proj_size={size}")
    if module._is_stacked:
        raise ValueError(f"{name} needs a single module, got {name}={value} for the modules of an Ensemble")


def check_no_projection(proj_size: Any) -> None:
    """Raise ValueError, with torch's words, if a module other than an LSTM was given a `proj_size`."""
    if proj_size is not None:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


def check_heads(heads: Any, hidden_size: int, cell: Cell) -> None:
    """Raise TypeError or ValueError unless `heads` is an int that divides the units, or 1 if no state is multiplied."""
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads should be of type int, got: {type(heads).__name__}")
    if heads < 1 or hidden_size % heads:
        raise ValueError(f"heads must be 1 or more and divide hidden_size, which is {hidden_size}, got {heads}")
    if heads > 1 and not cell.gates_of_h and not cell.products:
        raise ValueError(
            f"heads must be 1 for the cell {cell.name}, which has no gate that sums h and no products, got {heads}"
        )


def check_sizes_without_x(cell: Cell, input_size: Any, num_layers: Any) -> None:
    """Raise ValueError for input features or several layers of a cell without a product of x, which reads neither."""
    for name, value, wanted in (("input_size", input_size, 0), ("num_layers", num_layers, 1)):
        if not cell.gates_of_x and value != wanted:
            raise ValueError(
                f"{name} must be {wanted} for the cell {cell.name}, which has no gate that sums x, got {value}"
            )


def _instead_of_cell(argument: Any) -> str:
    """Return the advice of an error: what to pass in the place of `argument`, which is no cell of an `RNN`."""
    name = getattr(argument, "__name__", type(argument).__name__)
    word = argument if isinstance(argument, str) else name.removesuffix("Cell")
    known = next((cell.name for cell in CELLS if cell.name == word.lower()), None)
    if known is not None:
        return f"pass the cell fastlstm.cells.{known}"
    if inspect.isfunction(argument):
        return f"declare {argument.__name__} by @fastlstm.cell(gates=..., states=...)"
    if argument is None or isinstance(argument, int):
        return "use fastlstm.Elman in the place of torch.nn.RNN, or pass a cell first: RNN(fastlstm.cells.mgu, 8, 16)"
    return "pass a cell of fastlstm.cells, or what @fastlstm.cell declares"


def check_cell_of(module: Any, cell: Any = None, *_: Any, **__: Any) -> None:
    """Raise TypeError for no cell, ValueError for one without x and inputs, or with a parameter's name twice."""
    if not isinstance(cell, Cell):
        raise TypeError(f"{_instead_of_cell(cell)}: cell must be a fastlstm.Cell, got {type(cell).__name__}")
    if not cell.gates_of_x and not cell.inputs:
        raise ValueError(f"cell must have a gate that sums x, or inputs, got {cell.name} with the gates {cell.gates}")
    of_products = (f"weight_{name}" for name in cell.products)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *of_products, *cell.params]
    taken = next((name for k, name in enumerate(names) if name in names[:k]), None)
    if taken is not None:
        raise ValueError(f"cell must have one weight or param of a name, got {cell.name} with two of {taken}")
