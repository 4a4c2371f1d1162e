"""`Stream`: one time step a call, with weights that were packed before."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastlstm.autograd.modes import is_untransformed, no_autocast
from fastlstm.backends import settings
from fastlstm.backends.base import Layer
from fastlstm.backends.cpu import threads_now
from fastlstm.forks import object_lock
from fastlstm.layers import stream_checks
from fastlstm.layers.packing import rows_of
from fastlstm.layers.weight_hooks import frozen
from fastlstm.torch_private import dispatch_mode_count, dual_level, recognizer, when_compiling

MAX_PREPARED = 64  # numbers of rows for which a stream keeps the steps on states of a caller's own
MAX_PACKED = 4  # the same, where the steps of each number of rows have packed weights of their own


class _Prepared(NamedTuple):
    """The steps on states of a caller's own, for one number of rows."""

    inner: list[Any]  # the steps of all layers but the last
    last: Any
    zeros: list[Tensor]  # the states that stand for None
    output: Tensor  # an example
    layer_bytes: list[int]  # of each state of one layer
    recognizes: Callable[..., bool] = lambda *_: False  # whether x_t and the states are like those of a checked call


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
        self.batch_size, self._has_bare_state, self._lock = int(batch_size), module._has_bare_state, object_lock()
        with torch.inference_mode(False), torch.no_grad():
            module = self._module = frozen(module)
            module.backend = settings.named(module.backend)  # later defaults do not reach the stream
            self._layers, H = getattr(module, "num_layers", None), module.hidden_size
            like = self._like = module._example(module._layer_weights(0))[:0].clone()
            self._shape = torch.Size((batch_size, module.input_size))
            widths = [getattr(module, "proj_size", 0) or H] + [H] * (len(module._cell.states) - 1)
            self._states = [like.new_zeros(self._layers or 1, batch_size, width) for width in widths]
            self._own = self._states if self._layers is not None else [a[0] for a in self._states]  # as the module's
        if like.is_meta:
            raise ValueError("a stream needs a module with weights, and this one is on the device meta")
        self._output_size, self._packed = widths[0], [dict[Any, Any]() for _ in range(self._layers or 1)]
        self._prepare()

    def _prepare(self) -> None:
        """Make the steps of each layer, if the module's backend has such, for the present number of threads."""
        threads = threads_now()
        *inner, self._last = self._steps_on(self._states)
        self._prepared: dict[Any, _Prepared] = {}  # by the shape of x_t
        self._between = [torch.zeros_like(self._states[0][0]) for _ in inner]  # the outputs of these layers
        self._inner = [(step, to.data_ptr()) for step, to in zip(inner, self._between)]
        self._threads = threads

    def _steps_on(self, states: list[Tensor]) -> list[Any]:
        """Return a step for each layer that runs on `states`, or [None] if the module's backend has no steps."""
        module, steps = self._module, list[Any]()
        x = self._like.new_zeros(states[0].shape[1], self._shape[1])
        for k, packed in enumerate(self._packed):
            own = tuple([a[k] for a in states])
            layer = Layer(x, tuple(module._layer_weights(k)), own, None, None, False, module._cell)
            step = module._steps_of(layer, packed)
            if step is None:
                return [None]
            steps.append(step)
            x = own[0]
        return steps

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
            self._check_inputs(x_t, inputs, self.batch_size)
            with self._lock:
                return self._by_module_in_place(x_t, inputs)
        like, x = self._like, cast(Any, x_t)
        if (
            not is_untransformed(x)
            or getattr(x, "shape", None) != self._shape  # of None, which counts as untransformed
            or x.dtype is not like.dtype
            or x.device != like.device
            or x.requires_grad
        ):
            x = stream_checks.accepted_input(x, self.batch_size, self._shape[1], like)
        if inputs is not None:
            self._check_inputs(x, inputs, self.batch_size)
        with self._lock:
            if threads_now() != self._threads:
                self._prepare()
            if self._last is None or inputs is not None:
                return self._by_module_in_place(x, inputs)
            if not x.is_contiguous():
                x = x.contiguous()
            h, at = like.new_empty(self.batch_size, self._output_size), x.data_ptr()
            for step, to in self._inner:
                step(at, to)
                at = to
            self._last(at, h.data_ptr())
            return h

    def step(self, x_t: Tensor | None, state: Any = None, inputs: Any = None) -> tuple[Tensor, Any]:
        """Run one time step from states of your own. Those of the stream stay as they are.

        Args:
            x_t: (R, I), for any number R of rows. Otherwise as in a call of the stream.
            state: in the form of the attribute `state`, with R rows; None for zeros.
            inputs: as in a call of the stream.

        Returns:
            h (R, H) of the last layer, and the new states in the same form. All are new tensors.

        Raises:
            TypeError: if `x_t` is no tensor, or `state` has not the form of states.
            ValueError: for another shape, dtype or device, and for `inputs` that the cell has not.
            RuntimeError: if a tensor requires a gradient while gradients are enabled; under a transform of torch.func.
        """
        with self._lock:
            if threads_now() != self._threads:
                self._prepare()
            x: Any = x_t
            prepared = self._prepared.get(getattr(x, "shape", None))
            states: Any = state if type(state) is tuple else (state,)
            if prepared is not None and state is None:
                states = prepared.zeros
            if (
                prepared is None
                or inputs is not None
                or len(states) != len(prepared.zeros)
                or not prepared.recognizes(x, *states)
                or (dual_level() or dispatch_mode_count())
            ):
                x, states = self._accepted_for_step(x, state, inputs)
                if self._last is None or inputs is not None:
                    return self._by_module(x, states, inputs)
                prepared, states = self._prepare_for(x, states)
            h, new = torch.empty_like(prepared.output), [torch.empty_like(a) for a in prepared.zeros]
            x_address, before, after = x.data_ptr(), [a.data_ptr() for a in states], [a.data_ptr() for a in new]
            if not x_address or 0 in before:  # a storage that was resized to nothing
                self._accepted_for_step(x, state, None)
            for step in prepared.inner:
                step.set_states(before, after)
                step(x_address, after[0])
                x_address = after[0]
                before, after = ([at + n for at, n in zip(each, prepared.layer_bytes)] for each in (before, after))
            prepared.last.set_states(before, after)
            prepared.last(x_address, h.data_ptr())
        return h, self._in_form(new)

    def _prepare_for(self, x: Tensor, state: Any) -> tuple[_Prepared, Any]:
        """Return the steps for the rows of x, which recognize tensors like these from now on, and the states."""
        prepared = self._prepared.pop(x.shape, None)
        if prepared is None:
            with torch.inference_mode(False), torch.no_grad():
                zeros = [self._like.new_zeros(a.shape[0], len(x), a.shape[2]) for a in self._states]
                *inner, last = self._steps_on(zeros)
            own, layer_bytes = zeros if self._layers else [a[0] for a in zeros], [a[0].nbytes for a in zeros]
            prepared = _Prepared(inner, last, own, zeros[0][-1], layer_bytes)
        while len(self._prepared) >= (MAX_PACKED if prepared.last.packs_weights else MAX_PREPARED):
            del self._prepared[next(iter(self._prepared))]
        states = prepared.zeros if state is None else (state,) if self._has_bare_state else state
        self._prepared[x.shape] = prepared = prepared._replace(recognizes=recognizer([x, *states]))
        return prepared, states

    def _by_module(self, x_t: Tensor | None, state: Any, inputs: Any) -> Any:
        """Return h and the new states of the module's own step."""
        module = self._module
        with torch.no_grad(), no_autocast(self._like):
            if self._layers is None:
                result = type(module).forward(module, x_t, state)
                return (result if self._has_bare_state else result[0]).clone(), result
            options = {} if inputs is None else {"inputs": inputs}
            return type(module).step(module, x_t, state, **options)

    def _by_module_in_place(self, x_t: Tensor | None, inputs: Any) -> Tensor:
        h, state = self._by_module(x_t, self._in_form(self._own), inputs)
        with torch.no_grad():
            for a, b in zip(self._own, [state] if self._has_bare_state else state):
                a.copy_(b)
        return h

    def _in_form(self, states: list[Tensor]) -> Any:
        return states[0] if self._has_bare_state else tuple(states)

    def _accepted_for_step(self, x_t: Any, state: Any, inputs: Any) -> tuple[Any, Any]:
        """Return x_t and the states for `step`, None for zeros, or raise the error that says what is wrong."""
        like, rows = self._like, None
        if self._last is not None or self._module._cell.gates_of_x:
            x_t = stream_checks.accepted_input(x_t, None, self._shape[1], like)
            rows = len(x_t)
        self._check_inputs(x_t, inputs, rows)
        if state is None or rows is None:
            return x_t, state
        wanted = [(*a.shape[:-2], rows, a.shape[-1]) for a in self._own]
        states = stream_checks.states_of(state, wanted, like)
        return x_t, self._in_form([stream_checks.accepted("state", a, like) for a in states])

    def _check_inputs(self, x_t: Any, inputs: Any, rows: int | None) -> None:
        """Raise the error that says what is wrong with a cell's inputs, the only one of which may stand for x_t."""
        cell = self._module._cell
        if inputs is None and not cell.gates_of_x:
            inputs = {"x_t": x_t}
        if inputs is not None:
            stream_checks.check_inputs(inputs, cell, rows, self._module.hidden_size, self._like)

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
            states = [a.clone() for a in self._own]
        return self._in_form(states)

    @state.setter
    def state(self, state: Any) -> None:
        states = stream_checks.states_of(state, [tuple(a.shape) for a in self._own], self._like)
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
    Stream.step = torch.compiler.disable(Stream.step)  # type: ignore[method-assign]


when_compiling(_leave_frame)


def may_prepare(module: Any) -> bool:
    """Return whether a step of the module is one of its layers and no more, without code of a subclass."""
    return is_of_fastlstm(type(module).step if hasattr(module, "num_layers") else type(module).forward)


def is_of_fastlstm(function: Any) -> bool:
    """Return whether a function or method is one of fastlstm's own, and not of a user's subclass or instance."""
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__")).startswith("fastlstm.")
