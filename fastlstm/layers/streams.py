"""`Stream`: one time step a call, with weights that were packed before."""

import threading
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import parametrize

from fastlstm.autograd.modes import has_memory, is_untransformed, no_autocast
from fastlstm.backends import settings
from fastlstm.backends.base import Layer
from fastlstm.backends.cpu import threads_now
from fastlstm.layers.packing import rows_of
from fastlstm.layers.weight_hooks import weight_hooks
from fastlstm.torch_private import when_compiling


class Stream:
    """A module that runs one time step a call, on weights and states of its own. `LSTM.stream` and so on make it.

    The weights are those of the moment at which the stream is made, as hooks of `torch.nn.utils` and parametrizations
    compute them in eval mode. Later changes of the module's weights do not reach it. The stream computes what `step`
    of the module's class computes in eval mode, or `forward` of a cell's class, without gradients. It does not call the
    module: hooks do not run, nor does a function that stands in the place of `step` or `forward` of this module alone.
    On the CPU a call takes the kernel and a few microseconds. Calls from several Python threads run one after the
    other.

    Attributes:
        batch_size: B, the rows of each step.
        state: the states after the last step, as copies, in the form of the module's own: ``(h, c)`` of (L, B, H) each
            for an LSTM, (L, B, H) for a GRU, and without L for a cell. Setting it copies the tensors.
    """

    def __init__(self, module: Any, batch_size: int) -> None:
        """See `fastlstm.LSTM.stream`."""
        if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or batch_size < 1:
            raise ValueError(f"batch_size must be an int of at least 1, got {batch_size!r}")
        if getattr(module, "bidirectional", False):
            raise ValueError("a stream needs a module of one direction, and this one is bidirectional")
        if module._is_stacked:
            raise ValueError(
                "a stream needs a single module, and this one has the weights of all modules of an Ensemble"
            )
        self.batch_size, self._has_bare_state, self._lock = int(batch_size), module._has_bare_state, threading.Lock()
        with torch.inference_mode(False), torch.no_grad():
            module = self._module = _frozen(module)
            module.backend = settings.named(module.backend)  # later defaults do not reach the stream
            self._layers, H = getattr(module, "num_layers", None), module.hidden_size
            like = self._like = module._example(module._layer_weights(0))[:0].clone()
            self._shape = torch.Size((batch_size, module.input_size))
            widths = [getattr(module, "proj_size", 0) or H] + [H] * (len(module._cell.states) - 1)
            self._states = [like.new_zeros(self._layers or 1, batch_size, width) for width in widths]
            self._own = self._states if self._layers is not None else [a[0] for a in self._states]  # as the module's
        if like.is_meta:
            raise ValueError("a stream needs a module with weights, and this one is on the device meta")
        self._hidden, self._packed = H, [dict[Any, Any]() for _ in range(self._layers or 1)]
        self._prepare()

    def _prepare(self) -> None:
        """Make the steps of each layer, if the module's backend has such, for the present number of threads."""
        module, states, like = self._module, self._states, self._like
        threads, steps, between = threads_now(), list[Any](), list[Tensor]()
        for k, packed in enumerate(self._packed):
            x = like.new_zeros(self._shape if k == 0 else states[0][0].shape)
            layer = Layer(x, tuple(module._layer_weights(k)), tuple([a[k] for a in states]), None, None, False,
                          module._cell)  # fmt: skip
            step = module._steps_of(layer, packed)
            if step is None:
                steps = [None]
                break
            steps.append(step)
            between.append(x)
        *inner, self._last = steps
        self._threads, self._between = threads, between  # kept alive: `_inner` has their addresses
        self._inner = [(step, to.data_ptr()) for step, to in zip(inner, between[1:])]

    def __call__(self, x_t: Tensor | None, inputs: Any = None) -> Tensor:
        """Run one time step.

        Args:
            x_t: (B, I), of the dtype and on the device that the weights had. None for a cell without gates that sum x,
                or its only input (B, H).
            inputs: for a `fastlstm.RNN` whose cell has inputs, a dictionary as for its `step`; None for all others.

        Returns:
            h (B, H) of the last layer, a new tensor.

        Raises:
            TypeError: if `x_t` is no tensor.
            ValueError: for another shape, dtype or device, and for `inputs` that the cell has not.
            RuntimeError: if `x_t` requires a gradient while gradients are enabled; under a transform of torch.func.
        """
        if self._last is None and not self._module._cell.gates_of_x:
            self._check_inputs(inputs if isinstance(inputs, Mapping) else {"x_t": x_t})
            with self._lock:
                return self._by_module(x_t, inputs)
        like = self._like
        x: Any = x_t
        if (
            not is_untransformed(x)
            or getattr(x, "shape", None) != self._shape  # of None, which counts as untransformed
            or x.dtype is not like.dtype
            or x.device != like.device
            or x.requires_grad
        ):
            x = self._accepted(x)
        if inputs is not None and not self._module._cell.inputs:
            raise ValueError(f"inputs must be None, since the cell {self._module._cell.name} has none, got {inputs!r}")
        if isinstance(inputs, Mapping):
            self._check_inputs(inputs)
        with self._lock:
            if threads_now() != self._threads:
                self._prepare()
            if self._last is None or inputs is not None:
                return self._by_module(x, inputs)
            if not x.is_contiguous():
                x = x.contiguous()
            h, at = like.new_empty(self.batch_size, self._hidden), x.data_ptr()
            for step, to in self._inner:
                step(at, to)
                at = to
            self._last(at, h.data_ptr())
            return h

    def _by_module(self, x_t: Tensor | None, inputs: Any) -> Tensor:
        module, state = self._module, self._own[0] if self._has_bare_state else tuple(self._own)
        with torch.no_grad(), no_autocast(self._like):
            if self._layers is None:
                result = type(module).forward(module, x_t, state)
                h = (result if self._has_bare_state else result[0]).clone()
            else:
                options = {} if inputs is None else {"inputs": inputs}
                h, result = type(module).step(module, x_t, state, **options)
            for a, b in zip(self._own, [result] if self._has_bare_state else result):
                a.copy_(b)
        return h

    def _accepted(self, x_t: Any) -> Tensor:
        """Return an input that looks wrong at first sight, or raise the error that says what is wrong."""
        if not isinstance(x_t, Tensor):
            raise TypeError(f"x_t must be a tensor, got {type(x_t).__name__}")
        if x_t.shape != self._shape:
            rows = x_t.dim() == 2 and x_t.shape[1] == self._shape[1] and len(x_t)
            make = f": make it with stream(batch_size={rows})" if rows else ""
            raise ValueError(f"x_t must be (B, I) = {tuple(self._shape)}, got {tuple(x_t.shape)}{make}")
        self._check("x_t", x_t)
        return x_t.resolve_neg()

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Raise the error that says what is wrong with a cell's inputs, (B, H) each, in which any size may be 1."""
        shape = self.batch_size, self._hidden
        for name, a in inputs.items():
            if isinstance(a, Tensor):  # other types are refused later
                if a.dim() != 2 or any(size not in (1, wanted) for size, wanted in zip(a.shape, shape)):
                    raise ValueError(f"{name} must be (B, H) = {shape}, got {tuple(a.shape)}")
                self._check(name, a)

    def _check(self, name: str, a: Tensor) -> None:
        """Raise unless the steps can run on this tensor."""
        for what, wanted in (("dtype", self._like.dtype), ("device", self._like.device)):
            if getattr(a, what) != wanted:
                raise ValueError(f"{name} must have the {what} {wanted}, got {getattr(a, what)}")
        if a.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"a stream has no gradients: pass {name}.detach(), or call it under torch.no_grad()")
        if not has_memory(a):
            raise ValueError(f"{name} must have memory for its {a.numel()} numbers, got a storage of 0 bytes")
        if not is_untransformed(a.resolve_neg()):
            raise RuntimeError("a stream runs plain tensors, outside of torch.func's transforms and of tracers")

    def reset(self, rows: Any = None) -> None:
        """Set the states of some rows to zeros, of all if `rows` is None.

        Args:
            rows: an int, a slice, a sequence, array or tensor of ints, or booleans (B,).

        Raises:
            TypeError: for other types.
            ValueError: for an int outside the rows, and for booleans of another shape.
        """
        index = rows_of(rows, self.batch_size)
        with self._lock, torch.no_grad():
            for a in self._states:
                a[:, index] = 0

    @property
    def state(self) -> Any:
        """The states after the last step."""
        with self._lock:
            states = tuple([a.clone() for a in self._own])
        return states[0] if self._has_bare_state else states

    @state.setter
    def state(self, state: Any) -> None:
        states = (state,) if isinstance(state, Tensor) else state
        if not isinstance(states, tuple | list) or not all(isinstance(a, Tensor) for a in states):
            raise TypeError(f"state must be of the form of stream.state, got {type(state).__name__}")
        shapes, wanted = [tuple(a.shape) for a in states], [tuple(a.shape) for a in self._own]
        if shapes != wanted:
            raise ValueError(f"state must have the shapes {wanted}, got {shapes}")
        for b in states:
            if (b.dtype, b.device) != (self._like.dtype, self._like.device):
                wanted_kind = f"{self._like.dtype} on {self._like.device}"
                raise ValueError(f"state must be of {wanted_kind}, got {b.dtype} on {b.device}")
        with self._lock, torch.no_grad():
            for a, b in zip(self._own, states):
                a.copy_(b)

    def __repr__(self) -> str:
        return f"Stream({self._module!r}, batch_size={self.batch_size})"

    def __reduce__(self) -> Any:
        raise TypeError("a stream cannot be copied or pickled: pickle the module, and make a stream of it again")


def _leave_frame() -> None:
    """Keep dynamo out, which cannot trace what a call does with addresses."""
    Stream.__call__ = torch.compiler.disable(Stream.__call__)  # type: ignore[method-assign]


when_compiling(_leave_frame)


def may_prepare(module: Any) -> bool:
    """Return whether a step of the module is one of its layers and no more, without code of a subclass."""
    return is_of_fastlstm(type(module).step if hasattr(module, "num_layers") else type(module).forward)


def is_of_fastlstm(function: Any) -> bool:
    """Return whether a function or method is one of fastlstm's own, and not of a user's subclass or instance."""
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("fastlstm.")


def _frozen(module: Any) -> Any:
    """Return a module of the same class and options, in eval mode, with tensors of its own. So are its children.

    Hooks and parametrizations that compute weights do so here for the last time. All else is shared with `module`: some
    of it, such as a hook that holds a lock, cannot be copied.
    """
    cls: Any = type(module)
    new = cls.__new__(cls)
    vars(new).update(
        {name: _own(a) for name, a in vars(module).items() if name not in ("_plans", "_compiled_call_impl")}
    )
    new._parameters.update({name: a if a is None else Parameter(_own(a), False) for name, a in new._parameters.items()})
    new._buffers.update({name: _own(a) for name, a in new._buffers.items()})
    new._modules.update({name: a if a is None else _frozen(a) for name, a in new._modules.items()})
    vars(new)["training"] = False
    for key, hook in reversed(weight_hooks(new)):
        hook.remove(new)
        del new._forward_pre_hooks[key]
    if parametrize.is_parametrized(new):
        weights = {name: getattr(new, name) for name in new.parametrizations}
        new.__class__, _ = cls.__bases__[0], new._modules.pop("parametrizations")
        for name, a in weights.items():
            new.register_parameter(name, Parameter(a.detach()))
    return new.requires_grad_(False)


def _own(a: Any) -> Any:
    """Return a copy of a tensor or of a collection, and anything else as it is."""
    return a.detach().clone() if isinstance(a, Tensor) else copy(a) if isinstance(a, dict | list | set) else a
