"""Checks of the inputs and states that users pass to modules. A check that passes costs little: a message's details are
looked up only to raise. Where torch's module raises, the type and the words are torch's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.autograd.modes import autocast_of, has_memory

States = Sequence[Tensor]
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def check_forward(module: Any, x: Tensor, hx: Any, weight: Tensor, batch_sizes: Tensor | None = None) -> States | None:
    """Check `x` and `hx` as torch's module does. Return `hx` as states of (D*L, B, H), or None if it is None.

    Args:
        module: a `fastlstm.layers.recurrent.Recurrent`.
        x: the input as the caller gave it, or a PackedSequence's data (N, I).
        hx: None, or the states, as a tensor or a tuple or list of tensors, without the batch dimension where `x` has
            none.
        weight: any of the module's weights, for its dtype and device.
        batch_sizes: those of the PackedSequence, or None. Its input and states are checked too, unlike in torch.

    Raises:
        TypeError: if `x` is no tensor, or `hx` has not the form of states.
        ValueError: for the number of dimensions or the dtype of `x`. Autocast takes any dtype.
        RuntimeError: for other sizes and dtypes, and for devices.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a tensor or a PackedSequence, got {type(x).__name__}")
    dims = x.dim()
    if dims != 3 and dims != 2 and batch_sizes is None:
        raise ValueError(module._words.dims.format(dims))
    states = None
    if hx is not None:
        states = _check_with_states(module, x, hx, weight, batch_sizes)
    elif x.dtype is not weight.dtype or x.shape[-1] != module.input_size or (batch_sizes is not None and dims != 2):
        module.check_input(x.unsqueeze(1) if dims == 2 and batch_sizes is None else x, batch_sizes)
    if x.device != weight.device:
        raise RuntimeError(_devices("parameter", x, weight))
    return states


def _check_with_states(module: Any, x: Tensor, hx: Any, weight: Tensor, batch_sizes: Tensor | None) -> States:
    words = module._words
    states = as_states(module, hx, words.argument)
    dims, kind = (2, "unbatched 2-D") if batch_sizes is None and x.dim() == 2 else (3, "batched 3-D")
    for state in states:
        if state.dim() != dims:
            got = f"({', '.join(f'{a.dim()}-D' for a in states)}) tensors"
            got = f"{states[0].dim()}-D tensor" if module._has_bare_state else got
            raise RuntimeError(f"For {kind} input, {words.states} should also be {dims}-D but got {got}")
    sizes_fit = batch_sizes is None or x.dim() == 2
    if dims == 2:
        states = tuple([a.unsqueeze(1) for a in states])
        x = x.unsqueeze(0 if module.batch_first else 1)
    B = x.shape[0 if module.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
    count, hidden = module.num_layers * (2 if module.bidirectional else 1), module.hidden_size
    for k, state in enumerate(states):
        sizes_fit &= state.shape == (count, B, (module.proj_size or hidden) if k == 0 else hidden)
    if x.dtype is not weight.dtype or x.shape[-1] != module.input_size or not sizes_fit:
        module.check_forward_args(x, states[0] if module._has_bare_state else states, batch_sizes)
    check_states(x, states)
    return states


def check_step(module: Any, x: Tensor, state: Any, weight: Tensor) -> States | None:
    """Check `x` (B, I) or (I,) and `state` for `step`. Return `state` as states of (L, B, H) or (L, H), or None.

    Raises:
        ValueError: for a bidirectional module, or the number of dimensions or the dtype of `x`.
        TypeError: if `x` is no tensor, or `state` has not the form of states.
        RuntimeError: for other sizes and dtypes, and for devices; for recurrent dropout in training mode.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x_t must be a tensor, got {type(x).__name__}")
    if module.bidirectional:
        raise ValueError("step needs a module of one direction, and this one is bidirectional")
    if module.training and module._regularizers and module._regularizers[0]:
        raise RuntimeError(
            "step has no mask that lasts a sequence: recurrent_dropout must be 0 or the module in eval mode, "
            f"got recurrent_dropout={module.recurrent_dropout} in training mode"
        )
    dims = x.dim()
    if dims != 2 and dims != 1:
        raise ValueError(f"{module._words.name}.step: Expected x_t to be 1D or 2D, got {dims}D instead")
    if x.dtype is not weight.dtype or x.shape[-1] != module.input_size:
        module.check_input(x.unsqueeze(0) if dims == 2 else x.view(1, 1, -1), None)
    if x.device != weight.device:
        raise RuntimeError(_devices("parameter", x, weight))
    if state is None:
        return None
    states = as_states(module, state, "state")
    batch, layers, hidden = x.shape[:-1], module.num_layers, module.hidden_size
    for k, a in enumerate(states):
        size = (layers, *batch, (module.proj_size or hidden) if k == 0 else hidden)
        name = "state" if module._has_bare_state else f"state[{k}]"
        module.check_hidden_size(a, size, f"Expected {name} size {{}}, got {{}}")
    check_states(x, states)
    return states


def check_cell(module: Any, x: Tensor, hx: Any, weight: Tensor) -> States | None:
    """Check `x` (B, I) or (I,) and `hx` as torch's cell module does. Return `hx` as states, or None.

    Raises:
        TypeError: if `x` is no tensor, or `hx` has not the form of states.
        ValueError: for a number of dimensions other than 1 and 2.
        RuntimeError: for other sizes, for devices and for dtypes. Autocast takes any dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a tensor, got {type(x).__name__}")
    dims, words, states = x.dim(), module._words, None
    if dims != 2 and dims != 1:
        raise ValueError(words.dims.format(dims))
    if hx is not None:
        states = as_states(module, hx, words.argument)
        for k, state in enumerate(states):
            if state.dim() not in (1, 2):
                name = "hidden" if module._has_bare_state else f"hx[{k}]"
                raise ValueError(f"{words.name}: Expected {name} to be 1D or 2D, got {state.dim()}D instead")
    if x.shape[-1] != module.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {x.shape[-1]} expected {module.input_size}")
    if states is not None:
        size = (*x.shape[:-1], module.hidden_size)
        for k, state in enumerate(states):
            if state.shape != size:
                _raise_cell_state(module, x, k, state)
        check_states(x, states)
    if x.dtype is not weight.dtype and autocast_of(x) is None:
        raise RuntimeError(dtypes("parameter", x, weight))
    if x.device != weight.device:
        raise RuntimeError(_devices("parameter", x, weight))
    return states


def _raise_cell_state(module: Any, x: Tensor, k: int, state: Tensor) -> None:
    if state.dim() != x.dim():  # torch before 2.15 takes one size for another, or crashes
        size = "batch x hidden_size" if x.dim() == 2 else "hidden_size"
        raise RuntimeError(f"Expected {x.dim()}D hidden{k} ({size}), but got {state.dim()}D tensor")
    if x.dim() == 2 and state.shape[0] != x.shape[0]:
        raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
    got = state.shape[-1]
    raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {got}, expected {module.hidden_size}")


def check_given(x: Any, hx: Any) -> None:
    """Raise unless `x` is a tensor, and `hx` None or two tensors: RuntimeError for another number, else TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if hx is not None:
        _tuple_of(hx, ("h", "c"), "hx", "lstm expects two hidden states")


def as_states(module: Any, hx: Any, name: str) -> States:
    """Return `hx`, the argument `name`, as a sequence of tensors. A tensor is the state of a cell that has one.

    Raises:
        TypeError: if it is no tensor, or no tuple or list of tensors.
        RuntimeError: for another number of states than the cell has.
    """
    if not module._has_bare_state:
        return _tuple_of(hx, module._cell.states, name, module._words.number)
    if not isinstance(hx, Tensor):
        raise TypeError(f"{name} must be a tensor, {module._cell.states[0]}_0, got {type(hx).__name__}")
    return (hx,)


def _tuple_of(hx: Any, names: Sequence[str], name: str, number: str | None) -> States:
    if isinstance(hx, Tensor) and len(names) == 1:
        return (hx,)
    if not isinstance(hx, (tuple, list)):  # Dynamo of torch 2.9 knows no union
        raise TypeError(f"{name} must be {_described(names)}, got {type(hx).__name__}")
    if len(hx) != len(names):
        raise RuntimeError(number or f"{name} must be {_described(names)}, got {len(hx)}")
    for state in hx:
        if not isinstance(state, Tensor):
            description = f"a {type(hx).__name__} of {_listed([type(a).__name__ for a in hx])}"
            raise TypeError(f"{name} must be {_described(names)}, got {description}")
    return hx


def _described(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"a tensor, {names[0]}_0, or a tuple of it"
    count = _NUMBERS[len(names)] if len(names) < len(_NUMBERS) else str(len(names))
    return f"a tuple of {count} tensors, {_listed([f'{name}_0' for name in names])}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def check_states(x: Tensor, states: States, name: str = "hidden") -> None:
    """Raise RuntimeError unless the `states` have memory, the device and, without autocast, the dtype of `x`."""
    for state in states:
        if state.device != x.device:
            raise RuntimeError(_devices(name, x, state))
        if state.dtype != x.dtype and autocast_of(x) is None:
            raise RuntimeError(dtypes(name, x, state))
        if not has_memory(state):
            raise RuntimeError(f"{name} must have memory for its {state.numel()} numbers, got a storage of 0 bytes")


def with_only_input(cell: Any, x: Any, inputs: Any, layout: str) -> tuple[Any, tuple[Any, ...]]:
    """Return x and the cell's input tensors, whose shape errors call `layout`. A tensor x is that of the only input of
    a cell without gates that sum x, unless `inputs` are given too. Raises what `inputs_by_name` raises.
    """
    if not cell.gates_of_x and len(cell.inputs) == 1 and inputs is None:
        if isinstance(x, Tensor):
            return None, (x,)
        name = cell.inputs[0]
        wanted = f"input must be a tensor of {name}, {layout}, or inputs must map {name} to one"
        raise TypeError(f"{wanted}, got {type(x).__name__}")
    return x, inputs_by_name(inputs, cell.inputs, layout)


def inputs_by_name(inputs: Any, names: Sequence[str], layout: str) -> tuple[Any, ...]:
    """Return the values of the mapping `inputs` in the order of `names`. Raise unless it maps just these to tensors."""
    if inputs is None and not names:
        return ()
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{_mapping(names, layout)}, got {type(inputs).__name__}")
    if set(inputs) != set(names):
        raise ValueError(f"{_mapping(names, layout)}, got {', '.join(map(str, inputs)) or 'an empty mapping'}")
    for name in names:
        if not isinstance(inputs[name], Tensor):
            raise TypeError(f"{_mapping(names, layout)}, got {type(inputs[name]).__name__} for {name}")
    return tuple([inputs[name] for name in names])


def _mapping(names: Sequence[str], layout: str) -> str:
    example = ", ".join([f'"{name}": ...' for name in names])
    return f"inputs must map to tensors {layout}, as {{{example}}}" if names else "inputs must be None or empty"


def expanded(
    x: Tensor, inputs: Sequence[Tensor], names: Sequence[str], size: tuple[int, ...], layout: str
) -> tuple[Tensor, ...]:
    """Return a cell's `inputs`, called `names`, each expanded to the given size, called `layout`; booleans as 0 and 1.

    Raises:
        ValueError: unless each has these dimensions, of this size or of size 1: (T, B) would be read as (B, H).
        RuntimeError: unless they have the device and, without autocast, the dtype of `x`.
    """
    tensors = []
    for name, a in zip(names, inputs):
        if a.shape != size:
            if a.dim() != len(size) or not all(n == m or n == 1 for n, m in zip(a.shape, size)):
                wanted = f"shape {layout} = {size}, where any size may be 1"
                raise ValueError(f"inputs[{name!r}] must have {wanted}, got {tuple(a.shape)}")
            a = a.expand(size)
        tensors.append(a.to(x.dtype) if a.dtype == torch.bool else a)
    for name, a in zip(names, tensors):
        check_states(x, (a,), f"inputs[{name!r}]")
    return tuple(tensors)


def _devices(name: str, x: Tensor, other: Tensor) -> str:
    return (
        f"Input and {name} tensors are not at the same device, "
        f"found input tensor at {x.device} and {name} tensor at {other.device}"
    )


def dtypes(name: str, x: Tensor, other: Tensor) -> str:
    """Return the message for two tensors of different dtypes."""
    return (
        f"Input and {name} tensors are not the same dtype, "
        f"found input tensor with {x.dtype} and {name} tensor with {other.dtype}"
    )
