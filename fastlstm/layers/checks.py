"""Checks of what users pass to modules. `fastlstm.backends.base.check_layer` checks the tensors of one layer.

A check that passes costs little: the details of a message are looked up only to raise. Where `torch.nn.LSTM` raises,
the type and the words are torch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlstm.autograd.modes import autocast_of


def check_forward(module: Any, x: Tensor, hx: Any, weight: Tensor, batch_sizes: Tensor | None = None) -> Any:
    """Check `x` and `hx` as `torch.nn.LSTM` does. Return `hx` as a pair of (D*L, B, H), or None if it is None.

    Args:
        module: the `fastlstm.LSTM`.
        x: the input as the caller gave it, or a PackedSequence's data (N, I).
        hx: None, or a tuple or list of two tensors, both without the batch dimension where `x` has none.
        weight: any of the module's weights, for its dtype and device.
        batch_sizes: those of the PackedSequence, or None. Its input and states are checked too, unlike in torch.

    Raises:
        TypeError: if `x` is no tensor, or `hx` is no tuple or list of tensors.
        ValueError: for the number of dimensions or the dtype of `x`. Autocast takes any dtype.
        RuntimeError: for other sizes and dtypes, and for devices.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a tensor or a PackedSequence, got {type(x).__name__}")
    dims = x.dim()
    if dims != 3 and dims != 2 and batch_sizes is None:
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dims}D instead")
    if hx is not None:
        return _check_with_states(module, x, hx, weight, batch_sizes)
    if x.dtype is not weight.dtype or x.shape[-1] != module.input_size or batch_sizes is not None:
        module.check_input(x.unsqueeze(1) if dims == 2 and batch_sizes is None else x, batch_sizes)
    if x.device != weight.device:
        raise RuntimeError(_devices("parameter", x, weight))
    return None


def _check_with_states(module: Any, x: Tensor, hx: Any, weight: Tensor, batch_sizes: Tensor | None) -> Any:
    h_0, c_0 = _pair(hx, "lstm")
    dims, kind = (2, "unbatched 2-D") if batch_sizes is None and x.dim() == 2 else (3, "batched 3-D")
    if h_0.dim() != dims or c_0.dim() != dims:
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {dims}-D but got ({h_0.dim()}-D, {c_0.dim()}-D) tensors"
        )
    if dims == 2:
        h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
        x = x.unsqueeze(0 if module.batch_first else 1)
    B = x.shape[0 if module.batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
    states, hidden = module.num_layers * (2 if module.bidirectional else 1), module.hidden_size
    if (
        x.dtype is not weight.dtype
        or x.shape[-1] != module.input_size
        or batch_sizes is not None
        or h_0.shape != (states, B, module.proj_size or hidden)
        or c_0.shape != (states, B, hidden)
    ):
        module.check_forward_args(x, (h_0, c_0), batch_sizes)
    _check_states(x, h_0, c_0)
    if x.device != weight.device:
        raise RuntimeError(_devices("parameter", x, weight))
    return h_0, c_0


def check_step(module: Any, x: Tensor, state: Any, weight: Tensor) -> Any:
    """Check `x` (B, I) or (I,) and `state` for `LSTM.step`. Return `state` as a pair of tensors, or None.

    Raises:
        ValueError: for a bidirectional module, or the number of dimensions or the dtype of `x`.
        TypeError: if `x` is no tensor, or `state` is no tuple or list of tensors.
        RuntimeError: for other sizes and dtypes, and for devices.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x_t must be a tensor, got {type(x).__name__}")
    if module.bidirectional:
        raise ValueError("step needs a module of one direction, and this one is bidirectional")
    dims = x.dim()
    if dims != 2 and dims != 1:
        raise ValueError(f"LSTM.step: Expected x_t to be 1D or 2D, got {dims}D instead")
    if x.dtype is not weight.dtype or x.shape[-1] != module.input_size:
        module.check_input(x.unsqueeze(0) if dims == 2 else x.view(1, 1, -1), None)
    if x.device != weight.device:
        raise RuntimeError(_devices("parameter", x, weight))
    if state is None:
        return None
    h_0, c_0 = _pair(state, "lstm", "state")
    batch, layers, hidden = x.shape[:-1], module.num_layers, module.hidden_size
    module.check_hidden_size(h_0, (layers, *batch, module.proj_size or hidden), "Expected state[0] size {}, got {}")
    module.check_hidden_size(c_0, (layers, *batch, hidden), "Expected state[1] size {}, got {}")
    _check_states(x, h_0, c_0)
    return h_0, c_0


def check_cell(module: Any, x: Tensor, hx: Any, weight: Tensor) -> Any:
    """Check `x` (B, I) or (I,) and `hx` as `torch.nn.LSTMCell` does. Return `hx` as a pair of tensors, or None.

    Raises:
        TypeError: if `x` is no tensor, or `hx` is no tuple or list of tensors.
        ValueError: for a number of dimensions other than 1 and 2.
        RuntimeError: for other sizes, for devices and for dtypes. Autocast takes any dtype.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a tensor, got {type(x).__name__}")
    dims = x.dim()
    if dims != 2 and dims != 1:
        raise ValueError(f"LSTMCell: Expected input to be 1D or 2D, got {dims}D instead")
    if hx is not None:
        hx = _pair(hx, "lstm_cell")
        for k, state in enumerate(hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
    if x.shape[-1] != module.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {x.shape[-1]} expected {module.input_size}")
    if hx is not None:
        size = (*x.shape[:-1], module.hidden_size)
        for k, state in enumerate(hx):
            if state.shape != size:
                _raise_cell_state(module, x, k, state)
        _check_states(x, *hx)
    if x.dtype is not weight.dtype and not _casts(x):
        raise RuntimeError(_dtypes("parameter", x, weight))
    if x.device != weight.device:
        raise RuntimeError(_devices("parameter", x, weight))
    return hx


def _raise_cell_state(module: Any, x: Tensor, k: int, state: Tensor) -> None:
    if state.dim() != x.dim():  # torch before 2.15 takes one size for another, or crashes
        size = "batch x hidden_size" if x.dim() == 2 else "hidden_size"
        raise RuntimeError(f"Expected {x.dim()}D hidden{k} ({size}), but got {state.dim()}D tensor")
    if x.dim() == 2 and state.shape[0] != x.shape[0]:
        raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
    got = state.shape[-1]
    raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {got}, expected {module.hidden_size}")


def check_batch_sizes(batch_sizes: Tensor, rows: int) -> None:
    """Raise RuntimeError unless `batch_sizes` can belong to a PackedSequence whose data has `rows` rows."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # the values are not known
        return
    sizes = batch_sizes.tolist() if batch_sizes.dim() == 1 and batch_sizes.dtype is torch.int64 else [-1]
    if not sizes or sizes[-1] < 0 or sum(sizes) != rows or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(
            "batch_sizes of a PackedSequence must be int64, must not increase, and must sum up to the rows of its "
            f"data, {rows}, got {batch_sizes.dtype} {batch_sizes.tolist()}"
        )


def check_given(x: Any, hx: Any) -> None:
    """Raise unless `x` is a tensor, and `hx` None or two tensors: RuntimeError for another number, else TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if hx is not None:
        _pair(hx, "lstm")


def check_lengths(lengths: Any, batch: tuple[int, ...], steps: int | None) -> None:
    """Raise unless `lengths` is an integer tensor of shape `batch`: (B,), or () for unbatched input.

    Args:
        steps: T, which no length may exceed, or None if the values cannot be read.

    Raises:
        TypeError: for anything but an integer tensor.
        ValueError: for another shape, and for a length below 0 or beyond T.
    """
    integers = "lengths must be integers of shape (B,), as a tensor, an array or a list"
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{integers}, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{integers}, got {lengths.dtype}")
    if lengths.shape != batch:
        raise ValueError(f"lengths must have shape (B,) = {batch}, got {tuple(lengths.shape)}")
    if steps is not None:
        values = lengths.tolist() if batch else [lengths.item()]
        if values and (min(values) < 0 or max(values) > steps):
            wrong = next(n for n in values if not 0 <= n <= steps)
            raise ValueError(f"lengths must be from 0 to T = {steps}, got {wrong}")


def check_reset(reset: Any, steps: tuple[int, ...], layout: str, bidirectional: bool) -> None:
    """Raise unless `reset` is a boolean tensor of shape `steps`, named `layout`, and the module has one direction.

    Raises:
        TypeError: for anything but a boolean tensor.
        ValueError: for another shape, or a bidirectional module.
    """
    if bidirectional:
        raise ValueError("reset needs a module of one direction, and this one is bidirectional")
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a boolean tensor of shape {layout}, got {type(reset).__name__}")
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be a boolean tensor of shape {layout}, got {reset.dtype}: reset.bool() is one")
    if reset.shape != steps:
        raise ValueError(f"reset must have shape {layout} = {steps}, got {tuple(reset.shape)}")


def check_no_masks(reset: Any, lengths: Any) -> None:
    """Raise ValueError if a PackedSequence came with `reset` or `lengths`."""
    for name, value in (("reset", reset), ("lengths", lengths)):
        if value is not None:
            raise ValueError(f"{name} must be None for a PackedSequence, which carries its own lengths")


def check_forget_bias(forget_bias: Any, bias: bool) -> float:
    """Return `forget_bias` as a float.

    Raises:
        TypeError: if it is no real number.
        ValueError: if the module has no biases.
    """
    if isinstance(forget_bias, bool) or not isinstance(forget_bias, int | float):
        raise TypeError(f"forget_bias should be a number or None, got: {type(forget_bias).__name__}")
    if not bias:
        raise ValueError(f"forget_bias needs bias=True, got forget_bias={forget_bias} and bias=False")
    return float(forget_bias)


def is_pair(hx: Any) -> bool:
    """Return whether `hx` is None, or a tuple of two that are not None. The types of the two are not checked."""
    return hx is None or (type(hx) is tuple and len(hx) == 2 and hx[0] is not None and hx[1] is not None)


def _pair(hx: Any, function: str, name: str = "hx") -> Sequence[Tensor]:
    if not isinstance(hx, (tuple, list)):  # Dynamo of torch 2.9 knows no union
        raise TypeError(f"{name} must be a tuple of two tensors, h_0 and c_0, got {type(hx).__name__}")
    if len(hx) != 2:
        raise RuntimeError(f"{function} expects two hidden states")
    h_0, c_0 = hx
    if not (isinstance(h_0, Tensor) and isinstance(c_0, Tensor)):
        given = f"a {type(hx).__name__} of {type(h_0).__name__} and {type(c_0).__name__}"
        raise TypeError(f"{name} must be a tuple of two tensors, h_0 and c_0, got {given}")
    return hx


def _check_states(x: Tensor, h_0: Tensor, c_0: Tensor) -> None:
    for state in (h_0, c_0):
        if state.device != x.device:
            raise RuntimeError(_devices("hidden", x, state))
        if state.dtype != x.dtype and not _casts(x):
            raise RuntimeError(_dtypes("hidden", x, state))


def _devices(name: str, x: Tensor, other: Tensor) -> str:
    return (
        f"Input and {name} tensors are not at the same device, "
        f"found input tensor at {x.device} and {name} tensor at {other.device}"
    )


def _dtypes(name: str, x: Tensor, other: Tensor) -> str:
    return (
        f"Input and {name} tensors are not the same dtype, "
        f"found input tensor with {x.dtype} and {name} tensor with {other.dtype}"
    )


def _casts(x: Tensor) -> bool:
    """Return whether an autocast is active for the device of `x`. It brings all tensors to one dtype."""
    return autocast_of(x) is not None
