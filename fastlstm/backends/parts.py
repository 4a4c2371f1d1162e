"""Several layers and directions in one call: which tensors are whose, and how gradients go from part to part.

`Layer` says what a part is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlstm.backends.base import Gradients, Layer, Run, output_size

Optional = torch.Tensor | None
Call = tuple[Run, Layer, Run, Gradients]  # the arguments of the backward pass of one part


def examples(layer: Layer) -> list[Layer]:
    """Return each part alone. The inputs of later layers have their shape, but no values."""
    if layer.parts == 1:
        return [layer]
    first = [layer.part(k, layer.x) for k in range(layer.directions)]
    x = layer.x.new_empty(*layer.x.shape[:2], layer.directions * output_size(first[0]))
    return first + [layer.part(k, x) for k in range(layer.directions, layer.parts)]


def layers_of(layer: Layer, h: Any, saved: Sequence[Any]) -> list[tuple[Any, list[Run]]]:
    """Return for each layer of a module its output, and each direction's output and saved values, from a `Plan`'s."""
    states, parts, D = len(layer.cell.states), layer.parts, layer.directions
    sequences, gates, layers = [*saved[: len(saved) - parts]], saved[len(saved) - parts :], []
    count = 1 + D * (states - 1)
    sequences.insert((layer.layers - 1) * count, h)
    for n in range(layer.layers):
        output, *inner = sequences[n * count : (n + 1) * count]
        outputs, runs = [output] * D if D == 1 or output is None else output.chunk(D, -1), []
        for d in range(D):
            own = inner[d * (states - 1) : (d + 1) * (states - 1)]
            runs.append(Run(outputs[d], (None,) * states, (*own, gates[n * D + d])))
        layers.append((output, runs))
    return layers


def backward(
    grads: Run, layer: Layer, run: Run, needs: Gradients, backward_of: Callable[[int, list[Call]], Sequence[Gradients]]
) -> Gradients:
    """Return the gradients of a run of several parts, without those of inputs. `grads`: of the results, maybe of the
    saved states too. `backward_of`: returns those of all directions of a layer, from its first part's number and
    arguments.
    """
    D, parts, count, dh = layer.directions, layer.parts, len(layer.weights) // layer.parts, grads.h
    layers = layers_of(layer, run.h, run.saved)
    of_saved = layers_of(layer, None, (*grads.saved, *[None] * parts)) if grads.saved else None
    of_parts: list[Any] = [None] * parts
    for n in reversed(range(layer.layers)):
        first, x = n * D, layer.x if n == 0 else layers[n - 1][0]
        below = needs.x or (first > 0 and any((*needs.weights[: first * count], *needs.states)))
        if not (below or any(needs.states) or any(needs.weights[first * count : (first + D) * count])):
            break  # nor does any layer below want anything
        calls = []
        for d, own in enumerate([dh] * D if D == 1 or dh is None else dh.chunk(D, -1)):
            k, (_, runs) = first + d, layers[n]
            last = tuple([a if a is None else a[k : k + 1] for a in grads.last])
            incoming = Run(own, last, ())
            if of_saved is not None:
                saved = of_saved[n][1][d]
                incoming = Run(_sum(own, saved.h), last, saved.saved[:-1])
            wanted = Gradients(below, needs.weights[k * count : (k + 1) * count], needs.states)
            calls.append((incoming, layer.part(k, x), runs[d], wanted))
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
