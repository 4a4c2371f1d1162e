"""`QuantizedLSTM`, `QuantizedGRU` and their cells: modules for inference with weights of int8."""

import warnings
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fastlstm.autograd.modes import autocast_of
from fastlstm.backends.base import Layer, Run
from fastlstm.int8 import call
from fastlstm.int8.definition import BITS, Activations, check_activations, quantize_weight
from fastlstm.layers import input_checks
from fastlstm.layers.functional import State
from fastlstm.layers.gru import GRU, GRUCell
from fastlstm.layers.like_torch import LikeTorch
from fastlstm.layers.lstm import LSTM, LSTMCell
from fastlstm.layers.modules import OWN, CellModule
from fastlstm.layers.recompute import Results
from fastlstm.layers.recurrent_cell import RecurrentCell
from fastlstm.layers.streams import may_prepare
from fastlstm.layers.typed import States
from fastlstm.layers.weight_hooks import REMOVERS, weight_hooks

# attributes that are not copied from the float module. The last two may be its compiled code
_OF_FLOAT = {*OWN, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_flat_weights",
             "_flat_weights_names", "_flat_weight_refs", "_compiled_call_impl", "forward"} - {"backend"}  # fmt: skip

_warned = False  # of a module that cannot be trained


class Quantized(CellModule, nn.Module):
    """A module whose weights are int8, with one float32 scale for each row of a weight.

    All tensors are buffers: a weight `weight_ih_l0` in torch's layout, its scales `weight_ih_l0_scale` (rows,), and
    the biases. Scales and biases stay float32 whatever the module is converted to. The module is always in eval mode.
    """

    activations: Activations
    _trains, _caches_tensors = False, True  # weights are buffers
    _float: Any  # the class of the float module
    _names: list[list[str]]  # of the float module's parameters, for each layer and direction
    _like: Tensor  # of no elements, with the dtype that inputs have
    hidden_size: int
    bias: bool

    def __init__(self, module: Any, activations: Activations = "int8", *, name: str = "") -> None:
        """Round the weights of a float module, which stays as it is.

        Args:
            module: of torch's class, or ours. Its hooks, mode of batches and backend stay.
            activations: the integers that inputs and states are rounded to in products: "int8" or "int16".
            name: what errors call the module.

        Raises:
            TypeError: for a module of another class.
            ValueError: for other activations; for a projection or zoneout; for parameters, buffers or modules that
                users added; for a weight that has infinity or NaN, or more than 65536 columns, or that is on the device
                meta, or that a hook of `torch.nn.utils` computes.
            RuntimeError: if the backend cannot run int8 layers, or there is no compiled library and none was named.
        """
        kind = self._float.__name__
        if not isinstance(module, (self._float, getattr(nn, kind))):
            wanted = f"module must be a torch.nn.{kind} or a fastlstm.{kind}, got {type(module).__name__}"
            raise TypeError(f"{wanted}: train one, and fastlstm.quantize makes a {type(self).__name__} of it")
        check_activations(activations)
        prefix = f"{name}." if name else ""
        if getattr(module, "proj_size", 0):
            raise ValueError(f"{name or 'the module'} must have no projection, got proj_size={module.proj_size}")
        zoneout = getattr(module, "zoneout", 0)
        if zoneout not in (0, (0, 0)):
            raise ValueError(f"{name or 'the module'} must have no zoneout, got zoneout={zoneout}")
        _check_tensors(module, name or "the module")
        weight = getattr(module, _names_of(module)[0][0])
        call.choose(getattr(module, "backend", None), weight.device)  # raises what the first call would
        nn.Module.__init__(self)
        vars(self).update(_shared(module))
        self.training, self.activations, self._names = False, activations, _names_of(module)
        for names in self._names:
            for each in names[:2]:
                values, scales = quantize_weight(getattr(module, each), prefix + each)
                self.register_buffer(each, values)
                self.register_buffer(f"{each}_scale", scales)
            for each in names[2:]:
                bias = getattr(module, each)
                self.register_buffer(each, None if bias is None else bias.detach().to(torch.float32, copy=True))
        self.register_buffer("_like", torch.empty(0, dtype=weight.dtype, device=weight.device), False)
        if isinstance(self, nn.RNNBase):
            self._init_flat_weights()

    def _layer_weights(self, index: int) -> list[Any]:
        """Return the weights of a `Layer`, then its scales."""
        buffers: Any = self._buffers
        ih, hh, *biases = names = self._names[index]
        scales = [buffers[f"{ih}_scale"], buffers[f"{hh}_scale"]]
        return [*[buffers[name] for name in names], *([] if biases else (None, None)), *scales]

    def _example(self, weights: list[Any]) -> Any:
        return self._like

    def _with_scales(self, layer: Layer) -> Layer:
        """Return the record of a layer, from one whose weights are those of `_layer_weights`."""
        x, weights, states, lengths, reset, reverse, cell, *_ = layer
        bits = BITS[self.activations]
        return Layer(x, weights[:4], states, lengths, reset, reverse, cell, (), weights[4:], bits)

    def _steps_of(self, layer: Layer, packed_weights: dict[Any, Any]) -> Any:
        return call.steps_of(self._with_scales(layer), self.backend, packed_weights) if may_prepare(self) else None

    def _run_int8(self, layer: Layer, plans: Any, has_layer_axis: bool) -> Run:
        """Run a layer in float32, whatever its dtype, as `call.run` does, with the weights of `_layer_weights`."""
        layer, to = self._with_scales(layer), autocast_of(layer.x) or layer.x.dtype
        if to is torch.float32 and layer.x.dtype is to:
            return call.run(layer, plans, self.backend, has_layer_axis)
        states = tuple([None if a is None else a.float() for a in layer.states])
        run = call.run(layer._replace(x=layer.x.float(), states=states), plans, self.backend, has_layer_axis)
        return Run(run.h.to(to), tuple([a.to(to) for a in run.last]), ())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def moved(a: Tensor) -> Tensor:
            new = fn(a)
            return new if a is self._like or new.dtype == a.dtype else a.to(new.device)

        return super()._apply(moved, recurse)

    def train(self, mode: bool = True) -> Any:
        """Return the module, which stays in eval mode since int8 weights cannot be trained. For a true `mode` the first
        call of the process gives a UserWarning: a model with other modules can be trained.
        """
        global _warned
        if mode and not _warned:  # once, whatever the warning filters say: a model changes its mode in each epoch
            _warned = True
            text = (
                f"a {type(self).__name__} is for inference: it has no parameters and stays in eval mode: {call.INSTEAD}"
            )
            warnings.warn(text, stacklevel=2)
        return super().train(False)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        errors = args[-1]
        for names in self._names:
            for each in names[:2]:
                value = state_dict.get(prefix + each)
                if isinstance(value, Tensor) and value.dtype is not torch.int8:
                    errors.append(
                        f"{prefix}{each} must have the dtype torch.int8, got {value.dtype}: load a float state_dict "
                        "before fastlstm.quantize, or into the model that fastlstm.dequantize returns"
                    )
                    return
                if isinstance(value, Tensor) and not value.is_meta and bool(value.eq(-128).any()):
                    errors.append(f"{prefix}{each} must have numbers from -127 to 127, got -128")
                    return
        super()._load_from_state_dict(state_dict, prefix, *args)
        device = getattr(self, self._names[0][0]).device
        if self._like.device != device:  # tensors were assigned to a module on another device
            self._like = self._like.new_empty(0, device=device)

    def dequantize(self) -> Any:
        """Return a float module with the weights that the int8 numbers stand for, in eval mode.

        It is a `fastlstm.LSTM`, `GRU`, `LSTMCell` or `GRUCell` with the same hooks. Its parameters have the dtype that
        inputs have, and all of them require gradients. This module stays as it is.
        """
        new = self._float.__new__(self._float)
        nn.Module.__init__(new)
        own = "activations", "_names"
        vars(new).update({name: value for name, value in _shared(self).items() if name not in own})
        if isinstance(new, nn.RNNBase):
            new._all_weights = [list(names) for names in self._names]
            new._flat_weights_names = [name for names in self._names for name in names]
        for names in self._names:
            for name in names:
                a = getattr(self, name)
                if a is not None and a.dtype is torch.int8:
                    a = a.float() * getattr(self, f"{name}_scale").unsqueeze(1)
                new.register_parameter(name, None if a is None else Parameter(a.to(self._like.dtype, copy=True)))
        if isinstance(new, nn.RNNBase):
            new._init_flat_weights()
        return new

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activations={self.activations}"


def _check_tensors(module: Any, name: str) -> None:
    """Raise ValueError where a hook computes a weight, or the module holds more than its weights."""
    for _, hook in weight_hooks(module):
        remover = next(remover for cls, remover in REMOVERS.items() if isinstance(hook, cls))
        raise ValueError(
            f"{name} must have no hook that computes a weight, got {type(hook).__name__}: remove it first, "
            f"with torch.nn.utils.{remover}"
        )
    known = {"parametrizations"}.union(*_names_of(module))
    added = [each for each in (*module._parameters, *module._buffers, *module._modules) if each not in known]
    if added:
        raise ValueError(
            f"{name} must have no parameters, buffers or modules beside its weights, which would be lost, "
            f"got {', '.join(added)}"
        )


def _shared(module: Any) -> dict[str, Any]:
    """Return the attributes that a module shares with its float or int8 counterpart: sizes, options, hooks."""
    of_float = _OF_FLOAT.union(*_names_of(module))  # a plain tensor may stand in the place of a weight
    attributes = {name: value for name, value in vars(module).items() if name not in of_float}
    return {name: copy(value) if isinstance(value, dict | list | set) else value for name, value in attributes.items()}


def _names_of(module: Any) -> list[list[str]]:
    """Return the names of weight_ih, weight_hh and the biases, for each layer and direction."""
    if isinstance(module, nn.RNNBase):
        return [list(names) for names in module._all_weights]
    return [["weight_ih", "weight_hh", "bias_ih", "bias_hh"]]


class QuantizedLayers(Quantized, LikeTorch[States]):
    """A stack of int8 layers, each in one or both directions."""

    _flat_weights_names: Any = ("_like",)  # torch's check of an input looks at the dtype of the first

    def _whole(self, *arguments: Any) -> Any:
        layer = super()._whole(*arguments)
        x, example = layer.x, self._like
        if x.dtype is not torch.float32 or example.dtype is not x.dtype or autocast_of(x) is not None:
            return None
        return self._with_scales(layer)

    def _plans_of_all(self) -> None:
        return None  # native runs a layer a call

    def _run_layer(self, k: int, layer: Layer, inner_states: bool) -> Results:
        plans = self._plans_of(0 if self.num_layers == 1 and not self.bidirectional else k + 1)
        run = self._run_int8(layer, plans, True)
        return run.h, run.last, ()


class QuantizedCell(Quantized, RecurrentCell[States]):
    """An int8 cell."""

    def _forward(self, x: Any, hx: Any) -> Any:
        states, is_row = input_checks.check_cell(self, x, hx, self._like), x.dim() == 1
        if is_row:
            x, states = x.unsqueeze(0), None if states is None else [a.unsqueeze(0) for a in states]
        first = (None,) * len(self._cell.states) if states is None else tuple(states)
        layer = Layer(x, tuple(self._layer_weights(0)), first, None, None, False, self._cell)
        last = self._run_int8(layer, self._plans_of(), False).last
        last = tuple([a.squeeze(0) for a in last]) if is_row else last
        return last[0] if self._has_bare_state else last


class QuantizedLSTM(QuantizedLayers[State]):
    """A `fastlstm.LSTM` for inference, with weights of int8. `fastlstm.quantize` makes it.

    It returns no cell states. The backward pass of its results raises RuntimeError.

    Buffers of layer k: ``weight_ih_l{k}`` and ``weight_hh_l{k}``, int8 in the shapes of `fastlstm.LSTM`'s parameters;
    ``weight_ih_l{k}_scale`` and ``weight_hh_l{k}_scale``, float32 (4H,); and ``bias_ih_l{k}`` and ``bias_hh_l{k}``,
    float32 (4H,). A bidirectional layer has each again, as ``weight_ih_l{k}_reverse`` and
    ``weight_ih_l{k}_reverse_scale``.
    """

    _float, _cell, _words = LSTM, LSTM._cell, LSTM._words
    get_expected_cell_size: Any = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden


class QuantizedGRU(QuantizedLayers[Tensor]):
    """A `fastlstm.GRU` for inference, with weights of int8, made by `fastlstm.quantize`. Its buffers are
    `QuantizedLSTM`'s, with 3H rows instead of 4H. The backward pass of its results raises RuntimeError.
    """

    _float, _cell, _words, _has_bare_state = GRU, GRU._cell, GRU._words, True


class QuantizedLSTMCell(QuantizedCell[State]):
    """A `fastlstm.LSTMCell` for inference, with weights of int8: ``weight_ih``, ``weight_ih_scale`` and so on."""

    _float, _cell, _words = LSTMCell, LSTMCell._cell, LSTMCell._words


class QuantizedGRUCell(QuantizedCell[Tensor]):
    """A `fastlstm.GRUCell` for inference, with weights of int8: ``weight_ih``, ``weight_ih_scale`` and so on."""

    _float, _cell, _words, _has_bare_state = GRUCell, GRUCell._cell, GRUCell._words, True
