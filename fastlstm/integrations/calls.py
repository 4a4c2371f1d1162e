"""Calls of cells and layers in place of a library's loop over time."""

from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Layer, Run
from fastlstm.call import run
from fastlstm.cells import Cell

Tensors = tuple[Any, ...]


def takes(*tensors: Tensor | None) -> bool:
    """Return whether fastlstm runs a call with these tensors: they are of one floating dtype, on the CPU and not empty,
    autocast is off, and a backward pass may save them.
    """
    given = [a for a in tensors if a is not None]
    same = all(a.is_cpu and a.dtype == given[0].dtype and a.numel() for a in given)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(a.is_inference() for a in given):
        return False
    return same and given[0].is_floating_point() and not torch.is_autocast_enabled("cpu")


def run_cell(
    cell: Cell, x: Tensor, weights: Tensors, states: Tensors = (), inputs: Tensors = (), **options: Any
) -> Run:
    """Run a cell over x (T, B, I). Weights, states and inputs are those of a `Layer`. No states are zeros."""
    layer = Layer(x, weights, states or (None,) * len(cell.states), None, None, False, cell, inputs)
    return run(layer, plans=None, **options)


def run_with_resets(layer: Any, x: Tensor, states: Any, starts: Tensor) -> tuple[Tensor, Any]:
    """Run a `fastlstm.LSTM` or `fastlstm.GRU` over sequences (T, B, I) in which episodes begin. `starts` (T, B) is 0
    except where a step is the first of an episode, and `states`, each (L, B, H), are those before the first step.
    Return the output (T, B, H), and the last states.
    """
    if len(x) > 1:
        return layer(x, states, reset=starts.bool())
    keep = (starts == 0).to(x.dtype).unsqueeze(2)  # A call without masks finds its plan sooner, and acting makes many.
    return layer(x, keep * states if isinstance(states, Tensor) else tuple([keep * state for state in states]))
