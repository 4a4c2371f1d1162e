"""Keras 3 on torch: its recurrent layers run fastlstm on the CPU, in place of a Python loop over time.

`enable` puts another method `inner_loop` into Keras's classes: the one that runs a layer over whole sequences.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch.nn.functional import pad

from fastlstm.backends.base import Layer
from fastlstm.call import run
from fastlstm.cells import library
from fastlstm.cells.spec import Cell
from fastlstm.integrations import import_library
from fastlstm.plan_cache import Plans
from fastlstm.weights import r_first

_ARGUMENTS = ["self", "sequences", "initial_state", "mask", "training"]
_originals: dict[Any, Callable[..., Any]] = {}  # Keras's own methods, while they are replaced
_plans = Plans(caches=False)  # Keras's weights lie transposed: comparing them would take as long as packing them anew


def enable() -> None:
    """Make Keras's layers LSTM, GRU and SimpleRNN run fastlstm on the CPU, those that exist and those to come.

    Bidirectional layers of them do so too, and so does ``keras.layers.RNN`` with a single cell of theirs. Results stay
    the same up to rounding, and models are saved and loaded as before. Keras's own code runs on other devices, and
    under a compiler or tracer. With a UserWarning that names the option it also runs for an activation other than
    Keras's default or a SimpleRNN's ``"relu"``; in training for ``recurrent_dropout``, and for ``dropout`` with
    ``implementation=1``; and for a mask (B, T, H).

    Raises:
        ImportError: without Keras 3.6 or newer.
        RuntimeError: if Keras's backend is not torch, or if its layers lack the method. Nothing changes then.
    """
    keras = import_library("keras", "keras", "3.6")
    if (backend := keras.backend.backend()) != "torch":
        raise RuntimeError(f"Keras's backend must be torch, got {backend}: set KERAS_BACKEND=torch before its import")
    classes = keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU  # a SimpleRNN has the method of RNN
    for cls in classes:
        if not hasattr(cls, "inner_loop") or list(inspect.signature(cls.inner_loop).parameters) != _ARGUMENTS:
            wanted = f"inner_loop({', '.join(_ARGUMENTS)})"
            raise RuntimeError(f"keras.layers.{cls.__name__} must have {wanted}, which keras {keras.__version__} lacks")
    for cls in classes:
        if cls not in _originals:
            _originals[cls] = cls.inner_loop
            cls.inner_loop = _replacement(keras, cls.inner_loop)


def disable() -> None:
    """Undo `enable`: Keras's layers run their own code again."""
    for cls, method in _originals.items():
        cls.inner_loop = method
    _originals.clear()


def _replacement(keras: Any, theirs: Callable[..., Any]) -> Callable[..., Any]:
    tensor = keras.ops.convert_to_tensor

    @wraps(theirs)
    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        cell = None if in_graph or not (x := tensor(sequences)).is_cpu else _cell_of(keras, self.cell, training)
        mask_of_rows = mask[0] if isinstance(mask, list | tuple) else mask
        if isinstance(cell, Cell) and mask_of_rows is not None and tuple(mask_of_rows.shape[2:]) not in ((), (1,)):
            cell = "mask with a value for each unit"
        if isinstance(cell, Cell):
            arrays = x, mask_of_rows, self.cell.kernel, self.cell.recurrent_kernel, self.cell.bias
            return _run(self, cell, [None if a is None else tensor(a) for a in arrays], initial_state, training)
        if cell is not None:
            _warn(f"fastlstm lacks Keras's {cell}, so that a keras.layers.{type(self).__name__} runs Keras's own code")
        return theirs(self, sequences, initial_state, mask=mask, training=training)

    return inner_loop


def _cell_of(keras: Any, cell: Any, training: bool) -> Cell | str | None:
    """Return the cell that computes what a cell of Keras does, the option that it lacks, or None for other cells."""
    layers, of = keras.layers, keras.activations
    simple = {of.tanh: library.elman_tanh, of.relu: library.elman_relu}
    gru = library.gru if getattr(cell, "reset_after", True) else library.gru_reset_before
    kinds = {layers.LSTMCell: {of.tanh: library.lstm}, layers.GRUCell: {of.tanh: gru}}
    cells = (kinds | {layers.SimpleRNNCell: simple}).get(type(cell))
    if cells is None:
        return None
    lacks = {
        "activation": cell.activation not in cells,
        "recurrent_activation": getattr(cell, "recurrent_activation", of.sigmoid) is not of.sigmoid,
        "recurrent_dropout": training and cell.recurrent_dropout > 0,
        "implementation": training and cell.dropout > 0 and getattr(cell, "implementation", 2) == 1,
    }
    if (name := next((name for name in lacks if lacks[name]), None)) is not None:
        value = getattr(cell, name)
        return f"{name}={getattr(value, '__name__', value)}"
    return cells[cell.activation]


def _run(layer: Any, cell: Cell, arrays: list[Any], states: list[Any], training: bool) -> Any:
    """Return what `inner_loop` returns. `arrays` are x (B, T, I), which steps run (B, T) or None, kernel (I, X H),
    recurrent kernel (H, X H), and bias (X H,), (2, X H) or None.
    """
    x, runs, *weights = arrays
    if training and layer.cell.dropout:
        x = x * layer.cell.get_dropout_mask(x[:, 0]).unsqueeze(1)
    if cell in (library.gru, library.gru_reset_before):
        weights = [None if a is None else r_first(a, -1) for a in weights]
    kernel, recurrent_kernel, bias = weights
    biases = (bias, None) if bias is None or bias.dim() == 1 else bias.unbind()
    blocks, rows = recurrent_kernel.t(), cell.gates_of_h * len(recurrent_kernel)
    of_layer = kernel.t(), blocks[:rows], *biases, *[blocks[rows:]] * len(cell.products)
    # Keras writes the new states of a stateful layer over the old ones, which the backward pass reads.
    first = tuple([a.to(kernel.dtype, copy=layer.stateful) for a in states])
    x = x.to(kernel.dtype).flip(1) if layer.go_backwards else x.to(kernel.dtype)
    if runs is not None:
        runs = runs.bool().flatten(1).expand(x.shape[:2])
        runs = runs.flip(1) if layer.go_backwards else runs
    lengths = None if runs is None or runs.all() else runs.sum(1)
    if lengths is not None:  # the steps that run move to the front of each row, and below the outputs move back
        x = x.take_along_dim((~runs).sort(dim=1, stable=True).indices.unsqueeze(2), 1)
    output, last, _ = run(Layer(x.transpose(0, 1), of_layer, first, lengths, None, False, cell), plans=_plans)
    output = output.transpose(0, 1)
    if lengths is None:
        return last[0], output, list(last)
    count = runs.cumsum(1) * (runs if layer.zero_output_for_mask else 1)  # of the steps of each row that have run
    count = count if layer.return_sequences else count[:, -1:]
    output = pad(output, (0, 0, 1, 0)).take_along_dim(count.unsqueeze(2), 1)  # zeros where none has run
    return output[:, -1], output, list(last)


_warn = cache(partial(warnings.warn, stacklevel=2))  # once for each text, whatever the warning filters say
