"""xLSTM and TiRex: fastlstm in the place of the sLSTM cells of the packages xlstm and tirex-ts, on the CPU.

Both packages run the sLSTM of Beck et al. (2024, arXiv:2405.04517) with heads, one step after the other in plain
PyTorch. The layer around the cell multiplies x, so that values of x come to the cell as inputs, and no gate sums x.
"""

import sys
import warnings
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastlstm.backends.base import Layer
from fastlstm.call import run
from fastlstm.cells import cell, clamp, exp, log_sigmoid, maximum, minimum, sigmoid, tanh, where
from fastlstm.integrations import import_library

Model = TypeVar("Model", bound=nn.Module)
# The modules that have the cells: the package, its oldest release, and the class and the options that fastlstm runs.
PLACES = {
    "xlstm.blocks.slstm.cell": ("xlstm", "2.0", "sLSTMCell_vanilla", "function='slstm' and backend='vanilla'"),
    "tirex.models.slstm.cell": ("tirex-ts", "1.4", "sLSTMCell", "backend='torch'"),
}
_declare = cell(
    gates={"i": "h", "f": "h", "z": "h", "o": "h"}, states=("h", "c", "n", "m"), inputs=("x_i", "x_f", "x_z", "x_o")
)


def _unit(i: Any, f_log: Any, z: Any, o: Any, c: Any, n: Any, m: Any) -> Any:
    """Return the output and the new states of a unit. While its n is zero it has seen nothing, and its m is i."""
    f_log = f_log + m
    m = where(n > 0, maximum(i, f_log), i)
    i, f = minimum(exp(i - m), 1.0), minimum(exp(f_log - m), 1.0)
    c, n = f * c + i * tanh(z), f * n + i
    return sigmoid(o) * c / n, c, n, m


@_declare
def of_xlstm(i: Any, f: Any, z: Any, o: Any, c: Any, n: Any, m: Any, x_i: Any, x_f: Any, x_z: Any, x_o: Any) -> Any:
    return _unit(i + x_i, log_sigmoid(f + x_f), z + x_z, o + x_o, c, n, m)


@_declare
def of_tirex(i: Any, f: Any, z: Any, o: Any, c: Any, n: Any, m: Any, x_i: Any, x_f: Any, x_z: Any, x_o: Any) -> Any:
    return _unit(i + x_i, log_sigmoid(clamp(f + x_f, max=15.0)), z + x_z, o + x_o, c, n, m)


def accelerate(model: Model) -> Model:
    """Make the sLSTM cells of a model run fastlstm on the CPU.

    Parameters, `state_dict` and results stay as they are, up to rounding. The cell of tirex-ts rounds its input, its
    weights and its states at each step to bfloat16, whatever type the model has. Ours does not, so that it differs by
    that rounding. Calls that fastlstm does not take run the package's own code: those on other devices or under
    autocast, with tensors of more than one dtype, without steps or rows, and with initial states of which some units
    have seen a step and others have not. A cell with options that fastlstm does not take stays, with a warning.

    Args:
        model: a module of xlstm or tirex-ts, or one that has such modules.

    Returns:
        `model`, changed.

    Raises:
        ImportError: for cells of a release that is older than xlstm 2.0 or tirex-ts 1.4.
        TypeError: for a model without sLSTM cells of these packages.
    """
    for module, theirs, ours in _cells_of(model):
        kind, backend = getattr(module.config, "function", "slstm"), getattr(module, "backend", "torch")
        if (type(module), kind, backend) == (theirs, "slstm", "torch"):
            module.__class__ = ours
        elif type(module) is not ours:
            package, *_, options = PLACES[theirs.__module__]
            warnings.warn(f"a cell of {package} stays as it is: fastlstm runs those with {options}", stacklevel=2)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: the cells run the code of their packages again. Return `model`.

    Raises what `accelerate` raises.
    """
    for module, theirs, ours in _cells_of(model):
        if type(module) is ours:
            module.__class__ = theirs
    return model


@cache
def _class_for(theirs: Any) -> type:
    """Return the class that takes the place of one of the packages'."""

    def forward(self: Any, input: Tensor, state: Tensor | None = None, lengths: Any = None) -> Any:  # noqa: A002
        return _run(self, input, state) if _takes(self, input, state) else theirs.forward(self, input, state)

    return type(theirs.__name__, (theirs,), {"forward": forward, "__module__": __name__, "__doc__": theirs.__doc__})


def __getattr__(name: str) -> Any:
    """Return one of the classes above, by whose names pickles find them."""
    for place, (package, oldest, theirs, _) in PLACES.items():
        if name == theirs:
            return _class_for(getattr(import_library(place, package, oldest), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _run(module: Any, input: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: A002
    """Do what `forward` of a cell of xlstm or tirex-ts does: return its output, (B, K, T, D) or as its `output_shape`
    says, and the last states h, c, n and m, (4, B, K D). The first ones are `state`, or zeros. `input` contains the
    values of x, (B, T, 4 K D) or as `input_shape` says.
    """
    R, b, K = module._recurrent_kernel_, module._bias_, module.config.num_heads
    if hasattr(module, "_permute_input"):  # a cell of xlstm
        module._check_input(input)
        x, kind = module._permute_input(input), of_xlstm
        R, b = module._recurrent_kernel_int2ext(R), module._bias_int2ext(b)
    else:
        x, kind = module._get_input(input), of_tirex
        R, b = R.unflatten(2, (4, -1)), b.view(K, 4, -1)
    states = (None,) * 4 if state is None else module._get_state(x, state).unbind()
    weights = None, R.permute(2, 0, 3, 1).flatten(0, 2), None, b.transpose(0, 1).flatten()
    inputs = x.reshape(*x.shape[:2], 4, -1).unbind(2)
    result = run(Layer(x.new_empty(*x.shape[:2], 0), weights, states, None, None, False, kind, inputs), plans=None)
    return module._permute_output(result.h), torch.stack(result.last)


def _takes(module: Any, x: Tensor, state: Tensor | None) -> bool:
    """Return whether fastlstm runs a call."""
    tensors = [module._recurrent_kernel_, module._bias_, x, *([] if state is None else [state])]
    same = all(a.is_cpu and a.dtype == x.dtype for a in tensors) and x.is_floating_point()
    if not same or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return False
    return state is None or bool((state[2] > 0).all() or (state[2] == 0).all())


def _cells_of(model: Any) -> list[tuple[Any, type, type]]:
    """Return the sLSTM cells of a model, each with its package's class that fastlstm runs and the one in its place."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    cells: list[Any] = []
    for place, (package, oldest, name, _) in PLACES.items():
        there = vars(sys.modules.get(place, sys))  # a model with cells of a package has imported it
        kinds = tuple(there[each] for each in ("sLSTMCellBase", "sLSTMCell") if each in there)
        if any(isinstance(module, kinds) for module in modules):
            theirs = getattr(import_library(place, package, oldest), name)
            cells += [(module, theirs, _class_for(theirs)) for module in modules if isinstance(module, kinds)]
    if not cells:
        raise TypeError(f"model must have sLSTM cells of xlstm or tirex-ts, got {type(model).__name__} without any")
    return cells
