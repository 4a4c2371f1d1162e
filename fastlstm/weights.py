"""Weights from TensorFlow and Keras, as the parameters of modules."""

from typing import Any

import torch
from torch import Tensor


def tensorflow_weights(kernel: Any, bias: Any, *, forget_bias: float = 1.0, suffix: str = "_l0") -> dict[str, Tensor]:
    """Return the parameters of a layer with the weights of TensorFlow 1's BasicLSTMCell, for `load_state_dict`.

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
    bias_ih = torch.cat([b_i, b_f + forget_bias, b_g, b_o])
    return _named(weight[:, :input_size], weight[:, input_size:], bias_ih, torch.zeros_like(bias_ih), suffix)


def keras_weights(kernel: Any, recurrent_kernel: Any, bias: Any, *, suffix: str = "_l0") -> dict[str, Tensor]:
    """Return the weights of a Keras LSTM layer (``get_weights()``) as parameters of a layer, for `load_state_dict`.

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
    _check_kernels(kernel, recurrent_kernel, 4, _hidden_size(bias))
    return _named(kernel.mT, recurrent_kernel.mT, bias, torch.zeros_like(bias), suffix)


def keras_gru_weights(kernel: Any, recurrent_kernel: Any, bias: Any, *, suffix: str = "_l0") -> dict[str, Tensor]:
    """Return the weights of a Keras GRU layer (``get_weights()``) as parameters of a layer, for `load_state_dict`.

    Keras has the gates in the order z, r, h (h is n here). With ``reset_after=True``, Keras' default, the reset gate
    acts on the product with the hidden state, as in a `GRU`. With ``reset_after=False`` it acts on the hidden state
    before the product, as in ``fastlstm.RNN(fastlstm.cells.gru_reset_before, I, H)``. The shape of the bias tells them
    apart.

    Args:
        kernel: (I, 3H): a tensor or an array.
        recurrent_kernel: (H, 3H).
        bias: (2, 3H), the input's and the recurrent one, or (3H,) with ``reset_after=False``; zeros of that shape for a
            layer with ``use_bias=False``.
        suffix: ``_l{k}`` for layer k of a module, with ``_reverse`` for the backward half of Keras' Bidirectional, the
            empty string for a `GRUCell`.

    Returns:
        ``weight_ih`` (3H, I), ``weight_hh`` (3H, H), ``bias_ih`` and ``bias_hh`` (3H,) under the names with `suffix`.
        With ``reset_after=False`` ``weight_hh`` (2H, H) and ``bias_hh`` (2H,) lack n, whose ``weight_n_h`` is (H, H).

    Raises:
        ValueError: for shapes that do not go together.

    Source: ``keras.layers.GRU``.
    """
    kernel, recurrent_kernel, bias = (torch.as_tensor(a) for a in (kernel, recurrent_kernel, bias))
    if bias.shape[:-1] not in ((2,), ()) or bias.dim() == 0 or bias.shape[-1] % 3:
        raise ValueError(f"bias must have shape (2, 3H), or (3H,) with reset_after=False, got {tuple(bias.shape)}")
    H = bias.shape[-1] // 3
    _check_kernels(kernel, recurrent_kernel, 3, H)
    weight_ih, weight_hh, bias_ih = (r_first(a) for a in (kernel.mT, recurrent_kernel.mT, bias.view(-1, 3 * H)[0]))
    if bias.dim() == 2:
        return _named(weight_ih, weight_hh, bias_ih, r_first(bias[1]), suffix)
    named = _named(weight_ih, weight_hh[: 2 * H], bias_ih, bias.new_zeros(2 * H), suffix)
    return named | {f"weight_n_h{suffix}": weight_hh[2 * H :].clone()}


def _hidden_size(bias: Tensor) -> int:
    if bias.dim() != 1 or bias.shape[0] % 4:
        raise ValueError(f"bias must have shape (4H,), got {tuple(bias.shape)}")
    return bias.shape[0] // 4


def r_first(a: Tensor, dim: int = 0) -> Tensor:
    """Return the blocks z, r, n of a Keras GRU, along an axis, in the order r, z, n of torch's."""
    z, r, n = a.chunk(3, dim)
    return torch.cat([r, z, n], dim)


def _check_kernels(kernel: Tensor, recurrent_kernel: Tensor, gates: int, H: int) -> None:
    if kernel.dim() != 2 or kernel.shape[1] != gates * H:
        raise ValueError(f"kernel must have shape (I, {gates}H) with H = {H}, got {tuple(kernel.shape)}")
    if recurrent_kernel.shape != (H, gates * H):
        raise ValueError(f"recurrent_kernel must have shape {(H, gates * H)}, got {tuple(recurrent_kernel.shape)}")


def _named(weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor, suffix: str) -> dict[str, Tensor]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    copies = (a.clone(memory_format=torch.contiguous_format) for a in (weight_ih, weight_hh, bias_ih, bias_hh))
    return {name + suffix: tensor for name, tensor in zip(names, copies, strict=True)}
