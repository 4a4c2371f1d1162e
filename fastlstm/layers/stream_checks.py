"""The errors of a stream's arguments, and these as its steps take them. `like` has the weights' dtype and device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.autograd.modes import has_memory, is_untransformed
from fastlstm.cells.spec import Cell


def accepted(name: str, a: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as steps take it, contiguous and without gradients, or raise unless they can run on it."""
    for what, wanted in (("dtype", like.dtype), ("device", like.device)):
        if getattr(a, what) != wanted:
            raise ValueError(f"{name} must have the {what} {wanted}, got {getattr(a, what)}")
    if a.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"a stream has no gradients: pass {name}.detach(), or call it under torch.no_grad()")
    if not has_memory(a):
        raise ValueError(f"{name} must have memory for its {a.numel()} numbers, got a storage of 0 bytes")
    a = a.resolve_neg()
    if not is_untransformed(a):
        raise RuntimeError("a stream runs plain tensors, outside of torch.func's transforms and of tracers")
    return a.detach().contiguous()


def accepted_input(x_t: Any, rows: int | None, input_size: int, like: Tensor) -> Tensor:
    """Return x_t, of `rows` rows or any number, as steps take it, or raise the error that says what is wrong."""
    if not isinstance(x_t, Tensor):
        raise TypeError(f"x_t must be a tensor, got {type(x_t).__name__}")
    others = len(x_t) if x_t.dim() == 2 and x_t.shape[1] == input_size else 0
    if rows is None and not others:
        raise ValueError(f"x_t must be (R, I) with I = {input_size} and at least one row, got {tuple(x_t.shape)}")
    if rows is not None and others != rows:
        make = f": make it with stream(batch_size={others}), or call its method step" if others else ""
        raise ValueError(f"x_t must be (B, I) = {(rows, input_size)}, got {tuple(x_t.shape)}{make}")
    return accepted("x_t", x_t, like)


def check_inputs(inputs: Any, cell: Cell, rows: int | None, hidden_size: int, like: Tensor) -> None:
    """Raise the error of a cell's inputs, (B, H) each, of which any size may be 1. `rows`: B, or None for any."""
    if not cell.inputs and cell.gates_of_x:
        raise ValueError(f"inputs must be None, since the cell {cell.name} has none, got {inputs!r}")
    for name, a in inputs.items() if isinstance(inputs, Mapping) else ():
        if isinstance(a, Tensor):  # other types are refused later
            shape = (rows, hidden_size) if rows or a.dim() != 2 else (len(a), hidden_size)
            if a.dim() != 2 or any(size not in (1, wanted) for size, wanted in zip(a.shape, shape)):
                raise ValueError(f"{name} must be (B, H) = {shape}, got {tuple(a.shape)}")
            accepted(name, a.to(like.dtype) if a.dtype == torch.bool else a, like)  # a mask of booleans is taken


def states_of(state: Any, wanted: Sequence[tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """Return the tensors of a `state` in the form of `Stream.state` and the `wanted` shapes, or raise its error."""
    states = (state,) if isinstance(state, Tensor) else state
    if not isinstance(states, tuple | list) or not all(isinstance(a, Tensor) for a in states):
        raise TypeError(f"state must be of the form of stream.state, got {type(state).__name__}")
    shapes = [tuple(a.shape) for a in states]
    if shapes != wanted:
        raise ValueError(f"state must have the shapes {wanted}, got {shapes}")
    for a in states:
        if (a.dtype, a.device) != (like.dtype, like.device):
            raise ValueError(f"state must be of {like.dtype} on {like.device}, got {a.dtype} on {a.device}")
    return [*states]
