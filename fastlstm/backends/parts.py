"""Several layers and directions in one call: which tensors are whose, and how gradients go from part to part.

`Layer` says what a part is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlstm.backends.base import Gradients, Layer, Run, hidden_size

Optional = torch.Tensor | None
Call = tuple[Run, Layer, Run, Gradients]  # the arguments of the backward pass of one part


def examples(layer: Layer) -> list[Layer]:
    """Return each part alone. The inputs of later layers have their shape, but no values."""
    if layer.parts == 1:
        return [layer]
    first = [layer.part(k, layer.x) for k in range(layer.directions)]
    x = layer.x.new_empty(*layer.x.shape[:2], layer.directions * hidden_size(first[0]))
    return first + [layer.part(k, x) for k in range(layer.directions, layer.parts)]


def joined(outputs: list[Any]) -> Any:
    """Return the output of a layer, from those of its directions."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def runs_of(layer: Layer, h: Any, saved: Sequence[Any]) -> list[Run]:
    """Return the output and the saved values of each part, from those of a run. `saved` is in the order that
    `fastlstm.backends.base.Plan` has for it.
    """
    states, parts = len(layer.cell.states), layer.parts
    *sequences, saved = [*saved[: len(saved) - parts], [*saved[len(saved) - parts :]]]
    if layer.directions == 1:
        sequences.insert((parts - 1) * states, h)
    each = [sequences[k * states : (k + 1) * states] for k in range(parts)]
    return [Run(h, (None,) * states, (*inner, gates)) for (h, *inner), gates in zip(each, saved)]


def backward(
    grads: Run, layer: Layer, run: Run, needs: Gradients, backward_of: Callable[[int, list[Call]], Sequence[Gradients]]
) -> Gradients:
    """Return the gradients of a run of several parts, without those of inputs.

    Args:
        grads: of the results. `saved` may have gradients of the saved states too.
        backward_of: returns the gradients of all directions of one layer, from the number of its first part and the
            arguments for each.
    """
    D, parts, count, dh = layer.directions, layer.parts, len(layer.weights) // layer.parts, grads.h
    runs = runs_of(layer, run.h, run.saved)
    of_saved = runs_of(layer, None, (*grads.saved, *[None] * parts)) if grads.saved else None
    of_parts: list[Any] = [None] * parts
    for first in reversed(range(0, parts, D)):
        x = layer.x if first == 0 else joined([each.h for each in runs[first - D : first]])
        below = needs.x or (first > 0 and any((*needs.weights[: first * count], *needs.states)))
        if not (below or any(needs.states) or any(needs.weights[first * count : (first + D) * count])):
            break  # nor does any layer below want anything
        calls = []
        for k, own in zip(range(first, first + D), [dh] * D if D == 1 or dh is None else dh.chunk(D, -1)):
            last = tuple([a if a is None else a[k : k + 1] for a in grads.last])
            incoming = Run(own, last, ())
            if of_saved is not None:
                incoming = Run(_sum(own, of_saved[k].h), last, of_saved[k].saved[:-1])
            wanted = Gradients(below, needs.weights[k * count : (k + 1) * count], needs.states)
            calls.append((incoming, layer.part(k, x), runs[k], wanted))
        of_parts[first : first + D] = backward_of(first, calls)
        dh = None
        for gradients in of_parts[first : first + D]:
            dh = _sum(dh, gradients.x)
    none = Gradients(None, (None,) * count, (None,) * len(needs.states))
    of_parts = [none if gradients is None else gradients for gradients in of_parts]
    weights = [a for gradients in of_parts for a in gradients.weights]
    states = [None if each[0] is None else torch.cat(each) for each in zip(*(a.states for a in of_parts))]
    return Gradients(dh, tuple(weights), tuple(states))


def _sum(a: Optional, b: Optional) -> Optional:
    return b if a is None else a if b is None else a + b
