"""Which kernel a call takes: plans for calls of one signature, and the same for calls of any."""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Gradients, Layer, Run, heads_of
from fastlstm.backends.cpu import threads_now
from fastlstm.backends.memory import converted, unpooled
from fastlstm.backends.numba.host.backward import Backward
from fastlstm.backends.numba.host.cells import counts
from fastlstm.backends.numba.host.forward import Forward
from fastlstm.backends.numba.host.signature import contiguous, readable, signature_of, strides_of
from fastlstm.torch_private import copy_all

Optional = Tensor | None
WIDE = torch.float32, torch.float64
SHORT = 1 << 14  # numbers of x and the states up to which a call of 16 bits copies them to memory that is kept
_wide: deque[Tensor] = deque()  # such memory of float32, which all plans share: one for each of the calls at a time


# What runs calls of no plan, for as many signatures as a program may have in turns.
_forward, _backward = lru_cache(1024)(Forward), lru_cache(1024)(Backward)


def forward(layer: Layer, save: bool, pieces: int = 0) -> Run:
    """See `fastlstm.backends.reference.forward`; the gates have `saved_shape`. `pieces`: of a number, for the matrix
    unit; with 0 only products that `sizes.input_pieces` names take it.
    """
    layer = readable(layer)
    return _forward(signature_of(layer, (), pieces_for(layer, pieces)), save).run(layer)


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients, pieces: int = 0) -> Gradients:
    """See `fastlstm.backends.reference.backward`."""
    layer = readable(layer)
    signature = signature_of(layer, (), pieces_for(layer, pieces))
    if signature.rows == 0:
        flat = layer.x.flatten(1, 2) if layer.x.dim() == 4 else layer.x, *layer.tensors[1:]
        zeros = [torch.zeros_like(a) if need and a is not None else None for a, need in zip(flat, needs.flat)]
        return Gradients.of(layer.cell, zeros)
    return _backward(signature, needs, run.kept[-1].dim() == 5).run(grads, layer, run)


def pieces_for(layer: Layer, pieces: int) -> int:
    """`pieces` where the kernels of the matrix unit can run the cell, else 0."""
    return pieces if pieces and counts(layer.cell).on_unit and heads_of(layer) == 1 else 0


class Plan:
    """How calls like an example run. See `fastlstm.backends.base.Plan`."""

    backend: str
    types: Any
    reads_h = True

    def __init__(
        self, layer: Layer, save: bool, kept: dict[Any, Any] | None, ends: tuple[int, ...], pieces: int
    ) -> None:
        """See `plan`."""
        pieces = pieces_for(layer, pieces)
        self.narrow = pieces == 1 and layer.x.dtype is torch.bfloat16
        self.keeps_cells = layer.x.dim() == 3 and layer.x.dtype in WIDE
        base = layer if self.narrow or layer.x.dtype in WIDE else layer._replace(x=converted(layer.x, torch.float32))
        seen = readable_in_plan(base)
        self.signature = s = signature_of(seen, ends, pieces)._replace(rounded=layer.x.dtype)
        # A whole sequence of a training step is followed by an update of the weights: it packs them for itself.
        keeps = not save or (s.T == 1 and (layer.x.dtype in WIDE or not pieces))
        self.kept = kept if keeps else None
        self.kernel = Forward(s, save, self.kept)
        self.backwards: dict[Any, Backward] = {}
        self.reads = all(a is b for a, b in zip((seen.x, *seen.weights), (base.x, *base.weights)))

    def forward(self, layer: Layer) -> Run:
        """Run a layer."""
        return self.kernel.run(layer if self.reads else readable_in_plan(layer))

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients:
        """The gradients of a layer that this plan has run, in the type that the kernel takes.

        Its tensors need not lie as they did in the forward pass: hooks of saved tensors may have moved them. The number
        of threads may have changed too, and is one in a forked child.
        """
        found_strides = strides(layer)
        if not self.reads or found_strides != self.signature.strides:
            layer = readable_in_plan(layer)
            found_strides = strides(layer)
        key = needs, found_strides, threads_now()
        found = self.backwards.get(key)
        if found is None:
            s = signature_of(layer, self.signature.ends, self.signature.pieces)._replace(rounded=self.signature.rounded)
            found = self.backwards[key] = Backward(s, needs, s.groups is not None, self.kept)
        return found.run(grads, layer, run)


def strides(layer: Layer) -> tuple[tuple[int, ...], ...]:
    """The strides that a kernel is told once, when it is prepared."""
    weight_ih, weight_hh, *_ = layer.weights
    return layer.x.stride(), strides_of(weight_ih), strides_of(weight_hh)


class SixteenBits(Plan):
    """A plan for x and states of bfloat16 or float16. They are computed in float32, and results are rounded once."""

    def __init__(self, layer: Layer, *others: Any) -> None:
        super().__init__(layer, *others)
        self.dtype, self.reads_h = layer.x.dtype, self.narrow  # otherwise h is kept in float32 as well
        self.sizes = layer.x.shape, *[self.kernel.states] * len(layer.states)
        self.counts = [prod(size) for size in self.sizes]
        self.short = sum(self.counts) < SHORT
        self.views: dict[Any, list[Tensor]] = {}  # of each memory of `_wide`

    def forward(self, layer: Any) -> Run:
        """Run a layer."""
        x, states = layer.x, layer.states
        given: Any = None
        memory: Any
        if self.short and not self.narrow and states[0] is not None:
            try:
                memory = _wide.pop()  # atomic: Python threads may be here at once
            except IndexError:
                memory = None
            given = self.views.get(memory)
            if given is None:
                with torch.inference_mode(False):  # to be written to outside it as well
                    memory = torch.empty(SHORT, dtype=torch.float32, device="cpu") if memory is None else memory
                    parts = memory[: sum(self.counts)].split(self.counts)
                    given = self.views[memory] = [part.view(size) for part, size in zip(parts, self.sizes)]
            copy_all(given, [x, *states])
            x, *states = given
        else:
            x, states = x if self.narrow else converted(x, torch.float32), widened(states)
        inputs = layer.inputs if self.narrow else widened(layer.inputs)
        h, last, kept = super().forward(layer._replace(x=x, states=states, inputs=inputs))
        if given is not None:
            _wide.append(memory)
        if kept and h is not None and not self.narrow:
            kept = *kept, h  # which the backward pass reads, before it is rounded
        return Run(rounded(h, self.dtype), (*(a.to(self.dtype) for a in last),), kept)

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients:
        """The gradients of a layer that this plan has run. x is widened again: kept, it would be twice its memory."""
        x, dh, h, kept = layer.x, grads.h, run.h, [*run.kept]
        if not self.narrow:
            x, dh = converted(x, torch.float32), *widened((dh,))
            h = kept.pop() if x.dim() == 3 else None
        layer = layer._replace(x=x, states=widened(layer.states), inputs=widened(layer.inputs))
        grads = Run(dh, widened(grads.last), widened(grads.kept))
        gradients = super().backward(grads, layer, Run(h, run.last, (*kept,)), needs)
        return Gradients.of(layer.cell, [rounded(a, self.dtype) for a in gradients.flat])


def readable_in_plan(layer: Layer) -> Layer:
    """`readable` with contiguous weights: those of later calls may have other strides."""
    return readable(layer._replace(weights=(*map(contiguous, layer.weights),)))


def widened(tensors: tuple[Optional, ...]) -> tuple[Optional, ...]:
    """Tensors of 16 bits in float32."""
    return (*(a if a is None else converted(a, torch.float32) for a in tensors),)


def rounded(a: Optional, dtype: torch.dtype) -> Optional:
    return a if a is None or a.dtype is dtype else converted(a, dtype, unpooled)


def plan(layer: Layer, save: bool, kept: dict[Any, Any] | None, ends: tuple[int, ...], pieces: int = 0) -> Plan:
    """How calls like this one run: of the same shapes, strides of x, types, contiguity and presence of each tensor, and
    number of threads.

    Args:
        layer: an example, whose x is (T, B, I), or (B, I) for one step alone. A step's run has no ``h``.
        save: whether runs keep what the backward pass reads.
        kept: what a layer's plans share, in which its weights stay packed from call to call; None: they are packed in
            each call.
        ends: the leading axes of the states, ``(1,)`` or ``()``.
        pieces: see `forward`.
    """
    kind = Plan if layer.x.dtype in WIDE else SixteenBits
    return kind(layer, save, kept, ends, pieces)
