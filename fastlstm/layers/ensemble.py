"""`Ensemble`: recurrent modules of one kind and size, which run in one call."""

import itertools
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrize

from fastlstm.layers import input_checks
from fastlstm.layers.recurrent import Recurrent
from fastlstm.layers.streams import is_of_fastlstm


class Ensemble(nn.Module):
    """M recurrent modules of one kind and size in one call, as a sweep over seeds or an ensemble of forecasters has:

        ensemble = fastlstm.Ensemble(fastlstm.LSTM(3, 5) for _ in range(16))
        output, (h_n, c_n) = ensemble(x)

    The M models are split over the threads, so that threads do not meet within a call, and Python runs once and not M
    times. In float32 and float64 each model gets the bits that it gets alone, in outputs as well as gradients, unless
    dropout draws or [the exceptions for a matrix unit](../transforms.md#the-same-bits) hold. Models of 16 bits are
    computed in float32, and results are rounded once.

    Args:
        modules: `fastlstm.LSTM`, `GRU`, `Elman` or `RNN` modules of the same class, options, dtype and device. Their
            weights are copied.

    Attributes:
        stacked: the parameters, with the names of a single module's and a leading axis of M, as
            `torch.func.stack_module_state` stacks them. An optimizer over them trains all models.

    Raises:
        TypeError: for anything but such modules, and for those that are parametrized, that have a weight which is no
            `torch.nn.Parameter`, or that an ensemble has already stacked.
        ValueError: without modules, and for modules that differ, or that have a projection, `recompute`,
            `recurrent_dropout`, `zoneout` or a cell with inputs, or that have hooks, buffers, modules, parameters or a
            `forward` of their own.

    Equivalent to ``torch.func.vmap`` over the modules' stacked parameters, whose Python takes longer.
    """

    stacked: Any

    def __init__(self, modules: Iterable[Any]) -> None:
        super().__init__()
        if isinstance(modules, Recurrent) or not isinstance(modules, Iterable):
            raise TypeError(f"modules must be several modules, got one {type(modules).__name__}")
        modules = list(modules)
        if not modules:
            raise ValueError("modules must be at least one, got none")
        first = modules[0]
        for k, module in enumerate(modules):
            _check_type(module, k)
            for (what, a), (_, b) in zip(_kind(first), _kind(module)):
                if a != b:
                    raise ValueError(f"modules must be of one kind, got {what} {a} and, at {k}, {b}")
            if own := _own(module):
                raise ValueError(
                    f"modules must have nothing beside their weights, since one module stands for all, got {own} at {k}"
                )
        if first.proj_size or first._regularizers or first.recompute:
            options = "proj_size, recompute, recurrent_dropout and zoneout"
            raise ValueError(f"modules must be without {options}, got {first}")
        if inputs := first._cell.inputs:
            got = f"{first._cell.name} with {', '.join(inputs)}"
            raise ValueError(f"modules must have a cell without inputs, which a call cannot give, got {got}")
        self.stacked = deepcopy(first)
        self.stacked._is_stacked = True
        _set_parameters(self.stacked, lambda name: torch.stack([module.get_parameter(name) for module in modules]))
        self.training = first.training

    def __len__(self) -> int:
        return len(next(self.stacked.parameters()))

    def unstack(self) -> list[Any]:
        """Return M modules as they were given, with copies of the present weights."""
        models = [deepcopy(self.stacked) for _ in range(len(self))]
        for k, model in enumerate(models):
            del model._is_stacked
            _set_parameters(model, partial(self._single, k))
        return models

    def _single(self, k: int, name: str) -> Tensor:
        return self.stacked.get_parameter(name)[k].clone()

    def _check_states(self, hx: Any, B: int) -> None:
        module = self.stacked
        size = (len(self), module.num_layers * (2 if module.bidirectional else 1), B, module.hidden_size)
        for a in input_checks.as_states(module, hx, "hx"):
            if a.shape != size:
                raise ValueError(f"hx must have states (M, D*L, B, H) = {size}, got {tuple(a.shape)}")

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:  # noqa: A002
        """Run all models.

        Args:
            input: (M, T, B, I), or (M, B, T, I) of modules with batch_first. Without M all models read the same input.
                One of the first form is copied, unless its rows of all models lie together: ``a.transpose(0, 1)`` of
                an ``a`` (T, M, B, I) does.
            hx: the states in the form of a module's own, each (M, D*L, B, H), or None for zeros.

        Returns:
            output (M, T, B, D*H), or (M, B, T, D*H), and the last states in the form of `hx`.

        Raises:
            TypeError: for an input that is no tensor, and for states that are not in the form of a module's own.
            ValueError: for another number of dimensions or models, and for states of another shape.
            RuntimeError: for another number of states, and for other sizes, dtypes and devices.
        """
        M, first = len(self), self.stacked.batch_first
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        if input.dim() == 3:
            input = input.expand(M, *input.shape)  # noqa: A001
        if input.dim() != 4 or input.shape[0] != M:
            raise ValueError(f"input must have 4 dimensions, the first M = {M}, or 3, got {tuple(input.shape)}")
        if hx is not None:
            self._check_states(hx, input.shape[1 if first else 2])
        x = input.flatten(0, 1) if first else _rows(input)
        output, last = self.stacked(x, hx if hx is None else _each(_rows, hx))
        output = output.unflatten(0, (M, -1)) if first else output.unflatten(1, (M, -1)).transpose(0, 1)
        return output, _each(lambda a: a.unflatten(1, (M, -1)).transpose(0, 1), last)


def _set_parameters(module: Recurrent, value: Callable[[str], Tensor]) -> None:
    """Give a module parameters of the values ``value(name)``. Names that share a parameter share the new one."""
    parameters: dict[Tensor, Parameter] = {}
    for name, a in list(module.named_parameters(remove_duplicate=False)):
        if a not in parameters:
            parameters[a] = Parameter(value(name).detach(), a.requires_grad)
        setattr(module, name, parameters[a])


def _check_type(module: Any, k: int) -> None:
    """Raise TypeError unless the k-th module is a single module of fastlstm, and its weights are its parameters."""
    is_ours = isinstance(module, Recurrent)
    is_parametrized, is_stacked = is_ours and parametrize.is_parametrized(module), is_ours and module._is_stacked
    if is_parametrized or is_stacked or not is_ours:
        kind = "a parametrized " * is_parametrized + "a stacked " * is_stacked + type(module).__name__
        raise TypeError(f"modules must be fastlstm.LSTM, GRU, Elman or RNN modules, got {kind}")
    for name in itertools.chain(*module._all_weights):
        if name not in module._parameters:
            kind = type(getattr(module, name, None)).__name__
            raise TypeError(f"modules must have torch.nn.Parameter as {name}, got {kind} at {k}")


def _own(module: Recurrent) -> list[str]:
    """Return what a module has beside its weights: hooks, buffers, modules, parameters of other names, a `forward`."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    weights = {name for names in module._all_weights for name in names}
    added = [name for name in (*module._parameters, *module._buffers, *module._modules) if name not in weights]
    if not is_of_fastlstm(module.forward):
        added.append("forward")
    return [name.strip("_") for name in hooks if getattr(module, name)] + added


def _rows(a: Tensor) -> Tensor:
    """Return (M, N, B, ...) as (N, M B, ...)."""
    return a.transpose(0, 1).flatten(1, 2)


def _each(function: Any, states: Any) -> Any:
    """Apply a function to a state that stands by itself, or to each of several."""
    return function(states) if isinstance(states, Tensor) else tuple([function(a) for a in states])


def _kind(module: Recurrent) -> list[tuple[str, Any]]:
    """Return what modules of an ensemble have in common, each with what an error calls it."""
    named = dict(module.named_parameters(remove_duplicate=False))
    first_names = {a: name for name, a in reversed(named.items())}  # shared by the names of a tied weight
    kind = [("class", type(module)), ("options", repr(module)), ("cell", module._cell), ("training", module.training)]
    for name, a in named.items():
        kind += [(f"{name}.{what}", getattr(a, what)) for what in ("shape", "dtype", "device", "requires_grad")]
        kind.append((f"{name} tied to", first_names[a]))
    return kind
