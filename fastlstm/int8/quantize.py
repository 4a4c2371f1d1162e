"""int8 weights for inference: `quantize` turns a model's LSTMs and GRUs into modules with them, `dequantize` back."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

from torch import nn

from fastlstm.convert import class_before, modules_of
from fastlstm.int8.definition import Activations, check_activations
from fastlstm.int8.modules import Quantized, QuantizedGRU, QuantizedGRUCell, QuantizedLSTM, QuantizedLSTMCell
from fastlstm.layers.gru import GRU, GRUCell
from fastlstm.layers.lstm import LSTM, LSTMCell

M = TypeVar("M", bound=nn.Module)
Excluded = Sequence[str] | Callable[[str, nn.Module], bool]
_KINDS: Any = (
    ((nn.LSTM, LSTM), QuantizedLSTM),
    ((nn.GRU, GRU), QuantizedGRU),
    ((nn.LSTMCell, LSTMCell), QuantizedLSTMCell),
    ((nn.GRUCell, GRUCell), QuantizedGRUCell),
)


@overload
def quantize(model: nn.LSTM | LSTM, activations: Activations = "int8", *, exclude: Excluded = ()) -> QuantizedLSTM: ...
@overload
def quantize(model: nn.GRU | GRU, activations: Activations = "int8", *, exclude: Excluded = ()) -> QuantizedGRU: ...
@overload
def quantize(model: nn.LSTMCell, activations: Activations = "int8", *, exclude: Excluded = ()) -> QuantizedLSTMCell: ...
@overload
def quantize(
    model: nn.GRUCell | GRUCell, activations: Activations = "int8", *, exclude: Excluded = ()
) -> QuantizedGRUCell: ...
@overload
def quantize(model: M, activations: Activations = "int8", *, exclude: Excluded = ()) -> M: ...
def quantize(model: Any, activations: Activations = "int8", *, exclude: Excluded = ()) -> Any:
    """Replace every LSTM and GRU in `model`, and their cells, torch's and ours, by a module with weights of int8.

    The new modules are for inference: a backward pass through them raises, and they have no parameters, so that an
    optimizer does not see them. They take the arguments of the old ones, keep their hooks and backend, and give
    results of the same dtype. `dequantize` gives float modules back.

    Args:
        model: any module, whose recurrent modules are replaced in place, or a recurrent one itself. Parametrized
            weights are rounded as they are in eval mode.
        activations: the integers that inputs and states are rounded to in products with the weights. "int16" has half
            of the error of "int8", and takes up to twice as long.
        exclude: what stays as it is: names such as ``("decoder.rnn",)``, of modules or of what they are in, or a
            function of a module's name and the module.

    Returns:
        `model`, changed, or the new module if `model` is recurrent itself. Where there is nothing to replace, a
        UserWarning says so.

    Raises:
        TypeError: when `model` is no module, or a scripted one; for a subclass of a recurrent module that is not
            excluded, since its own methods would be lost; for a recurrent module that `torch.compile` has wrapped.
        ValueError: for other `activations`; for a name in `exclude` that no module has; for a module with a projection
            or zoneout; for a weight that has infinity or NaN, or more than 65536 columns; for a weight that a hook
            computes, of `torch.nn.utils.prune`, `weight_norm` or `spectral_norm`. `model` is then unchanged.
    """
    check_activations(activations)
    modules_of(model, "quantize")
    if not callable(exclude) and not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be a name, several names or a function, got {exclude!r}")
    names = [exclude] if isinstance(exclude, str) else None if callable(exclude) else list(exclude)
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in names or ():
        if name not in known:
            raise ValueError(f"exclude must have names of modules in the {type(model).__name__}, got {name!r}")

    def is_excluded(name: str, module: nn.Module) -> bool:
        if callable(exclude):
            return bool(exclude(name, module))
        return any(name == each or name.startswith(f"{each}.") for each in names or ())

    def replacement(name: str, module: nn.Module) -> Any:
        for classes, quantized in _KINDS:
            if isinstance(module, classes) and not is_excluded(name, module):
                if class_before(module) not in classes:
                    raise TypeError(
                        f"{name or 'the module'} must be no subclass of {classes[0].__name__} unless it is excluded, "
                        f"got {type(module).__name__}, whose own methods would be lost"
                    )
                modes = [(each, each.training) for each in module.modules()]
                module.eval()  # parametrizations, too: those of `torch.nn.Dropout` drop nothing then
                try:
                    return quantized(module, activations, name=name)
                finally:
                    for each, training in modes:
                        each.training = training
        return None

    return _replaced(model, replacement, "quantize", "LSTM, GRU, LSTMCell or GRUCell to replace")


@overload
def dequantize(model: QuantizedLSTM) -> LSTM: ...
@overload
def dequantize(model: QuantizedGRU) -> GRU: ...
@overload
def dequantize(model: QuantizedLSTMCell) -> LSTMCell: ...
@overload
def dequantize(model: QuantizedGRUCell) -> GRUCell: ...
@overload
def dequantize(model: M) -> M: ...
def dequantize(model: Any) -> Any:
    """Replace every int8 module in `model` by the float module of fastlstm with the weights that it stands for.

    Args:
        model: any module, whose int8 modules are replaced in place, or one of these itself.

    Returns:
        `model`, changed, or the new module if `model` is of int8 itself. Where there is nothing to replace, a
        UserWarning says so. The weights are those of before `quantize`, rounded. Float modules are in eval mode.

    Raises:
        TypeError: when `model` is no module, or a scripted one; for an int8 module that `torch.compile` has wrapped.
    """
    modules_of(model, "dequantize")

    def replacement(name: str, module: Any) -> Any:
        return module.dequantize() if isinstance(module, Quantized) else None

    return _replaced(model, replacement, "dequantize", "int8 module")


def _replaced(model: Any, replacement: Callable[[str, nn.Module], Any], function: str, what: str) -> Any:
    """Put what `replacement` makes in the place of each module of a model, if it is not None. A module that is in
    several places stays one. `function`: who asks. `what`: what it looks for.

    Raises TypeError for a module that `torch.compile` has wrapped, since the wrapper would go on to run the old one.
    """
    replacements: dict[int, Any] = {}
    places = []
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in replacements:
            replacements[id(module)] = replacement(name, module)
        if replacements[id(module)] is not None:
            if name.rpartition(".")[2] == "_orig_mod":
                raise TypeError(
                    f"{function} cannot replace a module that torch.compile has wrapped, got "
                    f"{name.removesuffix('_orig_mod').rstrip('.') or 'the module'}: compile after {function}"
                )
            places.append((name, replacements[id(module)]))
    if not places:
        warnings.warn(f"{function} found no {what} in the {type(model).__name__}", stacklevel=3)
    for name, new in places:  # all of them exist: no model is left half replaced
        if not name:
            return new
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    return model
