"""How modules of a library come to run fastlstm: their class changes, and that of torch's layers inside them.

Nothing else of a module changes. So its copies, pickles and replicas compute with parameters of their own.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastlstm import convert
from fastlstm.backends.base import Layer, Run
from fastlstm.call import run
from fastlstm.cells import Cell
from fastlstm.integrations import import_library

Model = TypeVar("Model", bound=nn.Module)


class Place(NamedTuple):
    """A class of a library that fastlstm runs.

    Attributes:
        module, name: by which users import it.
        package, oldest: what pip knows it by, and the first release that will do.
        run: does what the class's `method` does, or returns None for a call that the library's own code is to run. That
            code also runs a call with arguments that `run` does not have.
        unlike: returns what keeps a module of the class as it is, in words, or "" for one that fastlstm runs.
        method: which method of the class `run` stands for.
    """

    module: str
    name: str
    package: str
    oldest: str
    run: Callable[..., Any]
    unlike: Callable[[Any], str] = lambda module: ""
    method: str = "forward"

    def is_of(self, cls: type) -> bool:
        """Return whether a class is the library's. Its name is common only within the library's own modules."""
        return cls.__qualname__ == self.name and f"{cls.__module__}.".startswith(f"{self.module}.")


class Places:
    """The places of an integration, whose name is that of its module: pickles look for the classes there."""

    def __init__(self, integration: str, *places: Place) -> None:
        self._integration, self._places = integration, places

    def accelerate(self, model: Model) -> Model:
        """Make the library's modules in a model run fastlstm on the CPU.

        Parameters, `state_dict` and results stay as they are, up to rounding. Layers of torch inside the modules become
        fastlstm's, and remain instances of torch's classes. Calls on other devices, under autocast,
        and with tensors of more than one dtype run the library's own code. A module of a derived class stays as it is,
        and so does one with options that fastlstm does not take. A UserWarning names each kind of module that stays.

        Args:
            model: one of the library's modules, or a module that has some.

        Returns:
            `model`, changed.

        Raises:
            ImportError: for a release of the library that is too old.
            TypeError: for a model without such modules.
        """
        found = False
        for module in getattr(model, "modules", tuple)():
            cls = type(module)
            place = next((place for parent in cls.__mro__ for place in self._places if place.is_of(parent)), None)
            found |= place is not None
            if place is None or cls.__module__ == self._integration:
                continue
            import_library(place.module, place.package, place.oldest)
            difference = place.unlike(module) if place.is_of(cls) else "it is of a derived class"
            if difference:
                warnings.warn(f"{cls.__name__} stays as it is: {difference}", stacklevel=2)
            else:
                module.__class__ = _class_for(place, self._integration)
                if _has_layers(module):
                    convert.replace(module, keep_type=True)
        if not found:
            names = ", ".join(dict.fromkeys(place.name for place in self._places))
            raise TypeError(f"model must have modules of {names}, got {type(model).__name__} without any")
        return model

    def restore(self, model: Model) -> Model:
        """Undo `accelerate`: the modules run the library's code again, and their layers are torch's. Return `model`.

        That holds also for a layer that was fastlstm's before `accelerate`, by `fastlstm.replace`.
        """
        for module in model.modules():
            if type(module).__module__ == self._integration:
                module.__class__ = type(module).__bases__[0]
                if _has_layers(module):
                    convert.restore(module)
        return model

    def named(self, name: str) -> type:
        """Return the class in the place of the library's of this name, as pickles ask for it.

        Raises:
            AttributeError: for any other name.
        """
        for place in self._places:
            if place.name == name:
                return _class_for(place, self._integration)
        raise AttributeError(f"module {self._integration!r} has no attribute {name!r}")


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(each, pair) for each in module.modules() for pair in convert.PAIRS)


@cache
def _class_for(place: Place, integration: str) -> type:
    """Return the class that takes a place."""
    theirs = getattr(import_module(place.module), place.name)
    own = getattr(theirs, place.method)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            result = place.run(self, *args, **kwargs)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise  # from within `run`, which does have these arguments
            result = None
        return own(self, *args, **kwargs) if result is None else result

    return type(place.name, (theirs,), {place.method: method, "__module__": integration, "__doc__": theirs.__doc__})


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
    cell: Cell,
    x: Tensor,
    weights: tuple[Any, ...],
    states: tuple[Any, ...] = (),
    inputs: tuple[Tensor, ...] = (),
    inner_states: bool = False,
) -> Run:
    """Run a cell over x (T, B, I). Weights, states and inputs are those of a `Layer`. No states are zeros."""
    layer = Layer(x, weights, states or (None,) * len(cell.states), None, None, False, cell, inputs)
    return run(layer, plans=None, inner_states=inner_states)


def run_with_resets(layer: Any, x: Tensor, states: Any, starts: Tensor) -> tuple[Tensor, Any]:
    """Run a layer over sequences in which episodes begin.

    Args:
        layer: a `fastlstm.LSTM` or `fastlstm.GRU` that is not `batch_first`.
        x: (T, B, I).
        states: those of the layer before the first step, each (L, B, H).
        starts: (T, B), 0 but where a step is the first of an episode.

    Returns:
        the output (T, B, H), and the last states.
    """
    if len(x) > 1:
        return layer(x, states, reset=starts.bool())
    keep = (starts == 0).to(x.dtype).unsqueeze(2)  # A call without masks finds its plan sooner, and acting makes many.
    return layer(x, keep * states if isinstance(states, Tensor) else tuple([keep * state for state in states]))
