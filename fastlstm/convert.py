"""Models over to fastlstm and back: `replace` changes the class of each module, which stays the same object."""

import inspect
import warnings
from functools import cache
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastlstm.backends import settings
from fastlstm.backends.settings import Backend
from fastlstm.layers.elman import Elman, ElmanCell
from fastlstm.layers.gru import GRU, GRUCell
from fastlstm.layers.lstm import LSTM, LSTMCell
from fastlstm.layers.modules import OWN, CellModule, warn_of_regularizers
from fastlstm.layers.rnn import RNN
from fastlstm.weights import keras_gru_weights, keras_weights, tensorflow_weights

__all__ = [
    "keras_gru_weights",
    "keras_weights",
    "replace",
    "replace_lstm",
    "restore",
    "restore_lstm",
    "tensorflow_weights",
]

M = TypeVar("M", bound=nn.Module)

_LSTMS: Any = ((nn.LSTM, LSTM), (nn.LSTMCell, LSTMCell))
PAIRS: Any = (*_LSTMS, (nn.GRU, GRU), (nn.RNN, Elman), (nn.GRUCell, GRUCell), (nn.RNNCell, ElmanCell))


class OwnForward(TypeError):
    """Raised for a subclass of torch's whose forward does not call the inherited one, so that ours would never run."""


class _Mixed:
    """Marks the classes that `replace` makes of torch's class, or a subclass of it, and ours."""

    _made_from: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # such a class has no name to import, so a pickle holds the class it was made from
        parts: Any = super().__reduce_ex__(protocol)
        return _new, (self._made_from,), *parts[2:]


def replace(model: M, *, backend: Backend | None = None, keep_type: bool = False) -> M:
    """Make every recurrent module of torch in `model` the one of fastlstm that takes its place.

    These are `torch.nn.LSTM`, `torch.nn.GRU`, `torch.nn.RNN` (which becomes a `fastlstm.Elman`) and their cells. The
    modules themselves change their class, so parameters (an optimiser keeps working), hooks, training mode, devices,
    dtypes, parametrizations and whatever refers to them stay. The same seed gives the same dropout.

    A subclass of torch's is replaced by a class made of both: its own methods stay, and what it inherited from torch's
    class it now inherits from ours; its instances remain instances of torch's class. A subclass stays as it is, with a
    UserWarning that names it, if it overrides ``forward`` and does not call ``super().forward``.

    Args:
        model: any module, or a recurrent one itself.
        backend: for the replaced modules and those that are ours already, as `fastlstm.LSTM`'s.
        keep_type: every replaced module remains an instance of torch's class, for a model that asks. Modules of
            fastlstm become instances too, except your own subclasses of them. `torch.compile` then breaks its graph at
            each of them, as it does at torch's own.

    Returns:
        `model`, changed. Where it has no such module, neither torch's nor ours, a UserWarning says so.

    Raises:
        TypeError: when `model` is no module, or a scripted one, whose code is fixed; for a subclass that has an
            attribute of its own where ours keeps another, as `backend`; if `keep_type` is no bool.
        ValueError: for an unknown backend.
    """
    return _replace("replace", PAIRS, model, backend, keep_type)


def replace_lstm(model: M, *, backend: Backend | None = None, keep_type: bool = False) -> M:
    """Do what `replace` does to every `torch.nn.LSTM` and `torch.nn.LSTMCell` in `model`, and to these alone: return
    and raise what it does. Where `model` has no LSTM, the UserWarning says which other recurrent layers it has.
    """
    return _replace("replace_lstm", _LSTMS, model, backend, keep_type)


def restore(model: M) -> M:
    """Undo `replace`: make each module of fastlstm in `model` torch's again, in place.

    Modules built as `fastlstm.LSTM` and so on become torch's too, and forget their `backend` and `forget_bias`. One
    with `recurrent_dropout` or `zoneout` forgets them with a UserWarning, since torch's then computes something else.
    A `fastlstm.RNN` or `fastlstm.Ensemble`, which torch has no counterpart of, and your own subclasses are left as they
    are, with a UserWarning: torch's class may lack what they call.

    Returns:
        `model`, changed.

    Raises:
        TypeError: when `model` is no module, or a scripted one.
    """
    return _restore("restore", PAIRS, model)


def restore_lstm(model: M) -> M:
    """Do what `restore` does, and raise what it raises, for `fastlstm.LSTM` and `fastlstm.LSTMCell` alone."""
    return _restore("restore_lstm", _LSTMS, model)


def _replace(function: str, pairs: Any, model: M, backend: Backend | None, keep_type: bool) -> M:
    if backend is not None:
        settings.check_name(backend)
    settings.check_bool("keep_type", keep_type)
    modules, replacements = modules_of(model, function), []
    if not any(isinstance(module, pair) for module in modules for pair in pairs):
        warnings.warn(_nothing_found(function, pairs, model, modules), stacklevel=3)
    reasons: dict[str, None] = {}  # each once
    for module in modules:
        try:
            cls = class_for(function, module, keep_type, pairs)
        except OwnForward as error:
            reasons[f"{error}; it stays torch's"] = None
            continue
        if cls is not None:
            replacements.append((module, cls))
    for reason in reasons:
        warnings.warn(reason, stacklevel=3)
    for module, cls in replacements:  # all classes exist: no model is left half replaced
        become(module, cls)
    if backend is not None:
        for module in modules:
            if isinstance(module, tuple(ours for _, ours in pairs)):
                vars(module)["backend"] = backend
    return model


def class_for(function: str, module: nn.Module, keep_type: bool, pairs: Any = PAIRS) -> type | None:
    """Return the class of ours that a module of torch's changes to, or None for any other module. With `keep_type` one
    of ours changes, too, unless it is an instance of torch's class, of a subclass of ours or of an Ensemble. Raise
    TypeError, for `function`, where a subclass has an attribute of its own that ours needs, and OwnForward.
    """
    cls: Any = type(module)
    for theirs, ours in pairs:
        parametrized = parametrize.is_parametrized(module)
        if isinstance(module, theirs) and not isinstance(module, ours):
            _check_names(function, module, theirs, ours)
            if _has_own_forward(cls, theirs):
                reason = "whose forward does not call super().forward"
                raise OwnForward(f"{function} cannot replace a {class_before(module).__name__} {reason}")
            return _replacement(cls, parametrized, theirs, ours, keep_type)
        if keep_type and isinstance(module, ours) and not isinstance(module, theirs) and not is_stack(module):
            original = _original(cls, parametrized, theirs, ours)
            return None if original is None else _replacement(original, parametrized, theirs, ours, True)
    return None


def is_stack(module: nn.Module) -> bool:
    """Return whether a module holds the weights of all modules of a `fastlstm.Ensemble`."""
    return isinstance(module, CellModule) and module._is_stacked


def become(module: nn.Module, cls: type) -> None:
    """Change the class of a module to one that `class_for` returned."""
    module.__class__ = cls
    vars(module).pop("_flat_weights", None)  # a second list of the weights, which ours does not keep


def _restore(function: str, pairs: Any, model: M) -> M:
    for module in modules_of(model, function):
        if is_stack(module):
            warnings.warn("the modules of an Ensemble have no counterpart in torch and stay", stacklevel=3)
            continue
        if isinstance(module, RNN) and pairs is PAIRS:
            warnings.warn("an RNN of any cell has no counterpart in torch and stays", stacklevel=3)
        for theirs, ours in pairs:
            if isinstance(module, ours):
                original = _original(type(module), parametrize.is_parametrized(module), theirs, ours)
                if original is None:
                    warnings.warn(f"{type(module).__name__} is a subclass of {ours.__name__} and stays", stacklevel=3)
                    continue
                warn_of_regularizers(module, 3)
                module.__class__ = original
                for name in OWN:
                    vars(module).pop(name, None)
                if isinstance(module, nn.RNNBase):
                    module._init_flat_weights()
    return model


def modules_of(model: Any, function: str) -> list[nn.Module]:
    """Return all modules of a model. Raise TypeError if it is none, or has scripted ones. `function`: who asks."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise TypeError(f"{function} cannot change a scripted module: its code is fixed")
    return modules


def class_before(module: nn.Module) -> type:
    """Return the class that a module had before it was parametrized, and before `replace` mixed ours into that."""
    cls: Any = type(module)
    if parametrize.is_parametrized(module):
        cls = cls.__bases__[0]
    return cls._made_from if issubclass(cls, _Mixed) else cls


def _nothing_found(function: str, pairs: Any, model: nn.Module, modules: list[nn.Module]) -> str:
    *most, last = [f"torch.nn.{theirs.__name__}" for theirs, _ in pairs]
    text = f"{function} found no {', '.join(most)} or {last} in the {type(model).__name__}"
    rest = [theirs for theirs, ours in PAIRS if (theirs, ours) not in pairs]
    others = [f"torch.nn.{cls.__name__}" for cls in rest if any(isinstance(module, cls) for module in modules)]
    return f"{text}; what it has of {' and '.join(others)} is not replaced" if others else text


def _replacement(cls: type, parametrized: bool, theirs: type, ours: type, keep_type: bool) -> type:
    if cls is theirs and not keep_type:
        return ours
    if parametrized:  # a class made for this one module; torch finds the class to go back to as its first base
        return _rebased(cls, _replacement(cls.__bases__[0], False, theirs, ours, keep_type))
    return _mixed(cls, theirs, ours)


def _original(cls: type, parametrized: bool, theirs: type, ours: type) -> type | None:
    if cls is ours:
        return theirs
    if parametrized:
        base = _original(cls.__bases__[0], False, theirs, ours)
        return None if base is None else _rebased(cls, base)
    return cls._made_from if issubclass(cls, _Mixed) else None


def _check_names(function: str, module: nn.Module, theirs: type, ours: type) -> None:
    """Raise TypeError where a subclass of torch's, or an instance, has a name that ours keeps something else under."""
    of_ours = {name for cls in ours.__mro__ if not issubclass(theirs, cls) for name in vars(cls)}
    private = {name for name in of_ours if name.startswith("_") and not name.startswith("__")} - {"_flat_weights"}
    hidden_names = private.difference(dir(theirs))  # a subclass may add to the methods of torch's class
    own = set(vars(module)).union(*(vars(cls) for cls in type(module).__mro__ if not issubclass(theirs, cls)))
    public = {"backend", "forget_bias", "recompute"} | ({"recurrent_dropout", "zoneout"} & of_ours)
    for name in sorted((hidden_names | public) & own):
        raise TypeError(f"{function} cannot replace a {type(module).__name__} that has a {name!r} of its own")


def _has_own_forward(cls: type, theirs: type) -> bool:
    """Return whether a subclass of torch's overrides forward, and no method of its own asks for the inherited one."""
    own = [item for each in cls.__mro__ if not issubclass(theirs, each) for item in vars(each).items()]
    unwrapped = [(name, inspect.unwrap(value)) for name, value in own if inspect.isfunction(value)]
    methods = [(name, value.__code__) for name, value in unwrapped if inspect.isfunction(value)]
    asks = any({"super", "forward"} <= _names_in(code) for _, code in methods)
    return not asks and any(name == "forward" for name, _ in methods)


def _names_in(code: CodeType) -> set[str]:
    return {*code.co_names}.union(*(_names_in(each) for each in code.co_consts if isinstance(each, CodeType)))


def _rebased(cls: type, base: type) -> type:
    """Return a class that parametrize made, on another base."""
    return type(cls.__name__, (base,), {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})


@cache
def _mixed(cls: type, theirs: type, ours: type) -> Any:
    """Return `cls`, `theirs` or a subclass, with `ours` before `theirs` in the order in which methods are found."""
    constructor = vars(theirs)["__init__"]  # ours would call it with the arguments of the base of both classes
    between = type(ours.__name__, (ours, theirs), {"__init__": constructor})
    bases = (_Mixed, between) if cls is theirs else (cls, _Mixed, between)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "_made_from": cls})


def _new(cls: type) -> Any:
    combined = next(_mixed(cls, theirs, ours) for theirs, ours in PAIRS if issubclass(cls, theirs))
    return combined.__new__(combined)
