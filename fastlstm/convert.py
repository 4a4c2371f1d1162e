"""Models over to `fastlstm.LSTM` and back, and weights from TensorFlow and Keras.

`replace_lstm` changes the class of each module in place: the object, its parameters, hooks, mode and names stay.
"""

import warnings
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlstm.backends import dispatch
from fastlstm.backends.dispatch import Backend
from fastlstm.layers.lstm import LSTM
from fastlstm.layers.lstm_cell import LSTMCell

M = TypeVar("M", bound=nn.Module)

_PAIRS: Any = ((nn.LSTM, LSTM), (nn.LSTMCell, LSTMCell))
_OTHERS = (nn.GRU, nn.RNN, nn.GRUCell, nn.RNNCell)  # these have no counterpart here


class _Mixed:
    """Marks the classes that `replace_lstm` makes of torch's class, or a subclass of it, and ours."""

    _made_from: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        # such a class has no name to import, so a pickle holds the class it was made from
        parts: Any = super().__reduce_ex__(protocol)
        return _new, (self._made_from,), *parts[2:]


def replace_lstm(model: M, *, backend: Backend | None = None, keep_type: bool = False) -> M:
    """Make every `torch.nn.LSTM` and `torch.nn.LSTMCell` in `model` a `fastlstm.LSTM` or `fastlstm.LSTMCell`.

    The modules themselves change their class, so parameters (an optimiser keeps working), hooks, training mode,
    devices, dtypes, parametrizations and whatever refers to them stay. The same seed gives the same dropout.

    A subclass of torch's is replaced by a class made of both: its own methods stay, and what it inherited from torch's
    class it now inherits from ours; its instances remain instances of `torch.nn.LSTM`.

    Args:
        model: any module, or an LSTM itself.
        backend: for the replaced modules and those that are ours already, as `fastlstm.LSTM`'s.
        keep_type: every replaced module remains an instance of `torch.nn.LSTM` or `torch.nn.LSTMCell`, for a model that
            asks. `torch.compile` then breaks its graph at each of them, as it does at torch's own.

    Returns:
        `model`, changed. Where it has no LSTM, neither torch's nor ours, a UserWarning says so, and which other
        recurrent layers it has, since these are not replaced.

    Raises:
        TypeError: when `model` is no module, or a scripted one, whose code is fixed; for a subclass that has an
            attribute of its own where ours keeps another, as `backend`.
        ValueError: for an unknown backend.
    """
    if backend is not None:
        dispatch.check_name(backend)
    modules, replacements = _modules(model, "replace_lstm"), []
    if not any(isinstance(module, pair) for module in modules for pair in _PAIRS):
        warnings.warn(_nothing_found(model, modules), stacklevel=2)
    for module in modules:
        for theirs, ours in _PAIRS:
            if isinstance(module, theirs) and not isinstance(module, ours):
                _check_names(module, theirs, ours)
                cls = _replacement(type(module), parametrize.is_parametrized(module), theirs, ours, keep_type)
                replacements.append((module, cls))
    for module, cls in replacements:  # all classes exist: no model is left half replaced
        module.__class__ = cls
        vars(module).pop("_flat_weights", None)  # a second list of the weights, which ours does not keep
    if backend is not None:
        for module in modules:
            if isinstance(module, (LSTM, LSTMCell)):
                vars(module)["backend"] = backend
    return model


def restore_lstm(model: M) -> M:
    """The inverse of `replace_lstm`: each `fastlstm.LSTM` and `fastlstm.LSTMCell` in `model` becomes torch's, in place.

    Modules built as `fastlstm.LSTM` become `torch.nn.LSTM` too, and forget their `backend` and `forget_bias`. Your own
    subclasses of `fastlstm.LSTM` are left as they are, with a UserWarning: torch's class may lack what they call.

    Returns:
        `model`, changed.

    Raises:
        TypeError: when `model` is no module, or a scripted one.
    """
    for module in _modules(model, "restore_lstm"):
        for theirs, ours in _PAIRS:
            if isinstance(module, ours):
                original = _original(type(module), parametrize.is_parametrized(module), theirs, ours)
                if original is None:
                    warnings.warn(f"{type(module).__name__} is a subclass of {ours.__name__} and stays", stacklevel=2)
                    continue
                module.__class__ = original
                for name in ("backend", "forget_bias", "_plans"):
                    vars(module).pop(name, None)
                if isinstance(module, nn.LSTM):
                    module._init_flat_weights()
    return model


def tensorflow_weights(kernel: Any, bias: Any, *, forget_bias: float = 1.0, suffix: str = "_l0") -> dict[str, Tensor]:
    """The parameters of a layer with the weights of TensorFlow 1's BasicLSTMCell, for `load_state_dict`.

    BasicLSTMCell holds one kernel for input and hidden state, column blocks in the order i, j, f, o (j is g here), and
    adds its forget bias at run time; here it becomes part of ``bias_ih``.

    Args:
        kernel: (I + H, 4H), the input's rows first: a tensor or an array.
        bias: (4H,).
        forget_bias: the cell's argument of that name.
        suffix: ``_l{k}`` for layer k of an `LSTM`, the empty string for an `LSTMCell`.

    Returns:
        ``weight_ih`` (4H, I), ``weight_hh`` (4H, H), ``bias_ih`` and ``bias_hh`` (4H,) under the names with `suffix`.

    Raises:
        ValueError: for shapes that do not go together.

    Source: ``tf.nn.rnn_cell.BasicLSTMCell`` (TensorFlow 1).
    """
    kernel, bias = torch.as_tensor(kernel), torch.as_tensor(bias)
    H = _hidden_size(bias)
    if kernel.dim() != 2 or kernel.shape[1] != 4 * H or kernel.shape[0] <= H:
        raise ValueError(f"kernel must have shape (I + H, 4H) with H = {H}, got {tuple(kernel.shape)}")
    i, g, f, o = kernel.mT.chunk(4)
    b_i, b_g, b_f, b_o = bias.chunk(4)
    weight = torch.cat([i, f, g, o])
    input_size = kernel.shape[0] - H
    return _named(weight[:, :input_size], weight[:, input_size:], torch.cat([b_i, b_f + forget_bias, b_g, b_o]), suffix)


def keras_weights(kernel: Any, recurrent_kernel: Any, bias: Any, *, suffix: str = "_l0") -> dict[str, Tensor]:
    """The parameters of a layer with the weights of a Keras LSTM layer (``get_weights()``), for `load_state_dict`.

    Keras has the gates in the order i, f, c, o (c is g here), and its forget bias is part of the bias.

    Args:
        kernel: (I, 4H): a tensor or an array.
        recurrent_kernel: (H, 4H).
        bias: (4H,).
        suffix: ``_l{k}`` for layer k of an `LSTM`, with ``_reverse`` for the backward half of Keras' Bidirectional, the
            empty string for an `LSTMCell`.

    Returns:
        ``weight_ih`` (4H, I), ``weight_hh`` (4H, H), ``bias_ih`` and ``bias_hh`` (4H,) under the names with `suffix`.

    Raises:
        ValueError: for shapes that do not go together.

    Source: ``keras.layers.LSTM``.
    """
    kernel, recurrent_kernel, bias = (torch.as_tensor(a) for a in (kernel, recurrent_kernel, bias))
    H = _hidden_size(bias)
    if kernel.dim() != 2 or kernel.shape[1] != 4 * H:
        raise ValueError(f"kernel must have shape (I, 4H) with H = {H}, got {tuple(kernel.shape)}")
    if recurrent_kernel.shape != (H, 4 * H):
        raise ValueError(f"recurrent_kernel must have shape {(H, 4 * H)}, got {tuple(recurrent_kernel.shape)}")
    return _named(kernel.mT, recurrent_kernel.mT, bias, suffix)


def _modules(model: Any, function: str) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise TypeError(f"{function} cannot change a scripted module: its code is fixed")
    return modules


def _nothing_found(model: nn.Module, modules: list[nn.Module]) -> str:
    text = f"replace_lstm found no torch.nn.LSTM or torch.nn.LSTMCell in the {type(model).__name__}"
    others = [f"torch.nn.{cls.__name__}" for cls in _OTHERS if any(isinstance(module, cls) for module in modules)]
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


def _check_names(module: nn.Module, theirs: type, ours: type) -> None:
    """Raise TypeError where a subclass of torch's, or an instance, has a name that ours keeps something else under."""
    of_ours = {name for cls in ours.__mro__ if not issubclass(theirs, cls) for name in vars(cls)}
    kept = {name for name in of_ours if name.startswith("_") and not name.startswith("__")} - {"_flat_weights"}
    own = set(vars(module)).union(*(vars(cls) for cls in type(module).__mro__ if not issubclass(theirs, cls)))
    for name in sorted((kept | {"backend", "forget_bias"}) & own):
        raise TypeError(f"replace_lstm cannot replace a {type(module).__name__} that has a {name!r} of its own")


def _rebased(cls: type, base: type) -> type:
    """A class parametrize made, on another base."""
    return type(cls.__name__, (base,), {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")})


@cache
def _mixed(cls: type, theirs: type, ours: type) -> Any:
    """`cls`, which is `theirs` or a subclass, with `ours` before `theirs`: resolved as cls, ..., ours, theirs, ..."""
    between = type(ours.__name__, (ours, theirs), {})
    bases = (_Mixed, between) if cls is theirs else (cls, _Mixed, between)
    return type(cls.__name__, bases, {"__module__": cls.__module__, "_made_from": cls})


def _new(cls: type) -> Any:
    made = next(_mixed(cls, theirs, ours) for theirs, ours in _PAIRS if issubclass(cls, theirs))
    return made.__new__(made)


def _hidden_size(bias: Tensor) -> int:
    if bias.dim() != 1 or bias.shape[0] % 4:
        raise ValueError(f"bias must have shape (4H,), got {tuple(bias.shape)}")
    return bias.shape[0] // 4


def _named(weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, suffix: str) -> dict[str, Tensor]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    copies = (a.clone(memory_format=torch.contiguous_format) for a in (weight_ih, weight_hh, bias))
    tensors = (*copies, torch.zeros_like(bias))
    return {name + suffix: tensor for name, tensor in zip(names, tensors, strict=True)}
