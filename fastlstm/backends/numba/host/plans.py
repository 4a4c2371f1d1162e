"""Chooses the kernels of a call: plans for calls of one signature, and functions for calls of any."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache, partial
from math import prod
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastlstm.backends.base import Gradients, Layer, Run, heads_of, hidden_size, output_size
from fastlstm.backends.cpu import threads_now
from fastlstm.backends.numba.host import sizes, thread_split
from fastlstm.backends.numba.host.backward import Backward
from fastlstm.backends.numba.host.forward import Forward
from fastlstm.backends.numba.host.frames import Frame
from fastlstm.backends.numba.host.passes import run_frames
from fastlstm.backends.numba.host.signature import Signature, contiguous, counts, readable, signature_of, strides
from fastlstm.backends.numba.host.sizes import lanes_of, panels_of
from fastlstm.backends.parts import backward as backward_of_parts
from fastlstm.backends.parts import examples
from fastlstm.backends.pool import converted, new_of, unpooled
from fastlstm.torch_private import copy_all

Optional = Tensor | None
WIDE = torch.float32, torch.float64
STACK_RANK = 5  # of the saved values of a stack, see `Traits`
SHORT = 1 << 14  # numbers of x and the states up to which a call of 16 bits copies them to memory of `_wide_memory`
_wide_memory: deque[Tensor] = deque()  # of float32, which all plans share: one for each call at a time


# These run calls without a plan, for as many signatures as a program may use in turns.
_forward, _backward = lru_cache(1024)(Forward), lru_cache(1024)(Backward)


def forward(layer: Layer, save: bool, components: int = 0) -> Run:
    """Run a layer, see `fastlstm.backends.reference.forward`. The gates have `saved_shape`. `components`: of a number,
    for the bf16 unit, or 0.
    """
    layer = readable(layer)
    return _forward(signature_of(layer, (), components_for(layer, components)), save).run(layer)


def backward(grads: Run, layer: Layer, run: Run, needs: Gradients, components: int = 0) -> Gradients:
    """Return the gradients of a layer, see `fastlstm.backends.reference.backward`."""
    layer = readable(layer)
    signature = signature_of(layer, (), components_for(layer, components))
    if signature.rows == 0:
        flat = layer.x.flatten(1, 2) if layer.x.dim() == 4 else layer.x, *layer.tensors[1:]
        zeros = [torch.zeros_like(a) if need and a is not None else None for a, need in zip(flat, needs.flat)]
        return Gradients.of(layer.cell, zeros)
    return _backward(signature, needs, run.saved[-1].dim() == STACK_RANK).run(grads, layer, run)


def components_for(layer: Layer, components: int) -> int:
    """Return `components` if the bf16 unit runs the layer, else 0. A cell without gates and products multiplies
    nothing. The columns of h that a projection leaves are not laid out in K blocks of their own. Of several heads
    each must have whole vector groups, of 64 units, so that no product is of two heads.
    """
    of_cell, heads, H = counts(layer.cell), heads_of(layer), hidden_size(layer)
    is_laid_out = output_size(layer) == H and (heads == 1 or H % (64 * heads) == 0)
    return components if is_laid_out and of_cell.preacts + of_cell.products > 0 else 0


class Plan:
    """Runs calls of one signature, see `fastlstm.backends.base.Plan`."""

    backend: str
    types: Any
    reads_h = True
    known: dict[Any, Any]
    loop: Any

    def __init__(
        self, layer: Layer, save: bool, caches: dict[Any, Any] | None, state_axes: tuple[int, ...], components: int,
        shares: int = 1, part: int = 0, directions: int = 1,
    ) -> None:  # fmt: skip
        """Prepare the kernels. `shares`: how many calls share the threads. `part`, `directions`: see `Forward`."""
        components = components_for(layer, components)
        self.is_bfloat16 = components == 1 and layer.x.dtype is torch.bfloat16
        self.saves_sequences = layer.x.dim() == 3 and layer.x.dtype in WIDE
        is_taken = self.is_bfloat16 or layer.x.dtype in WIDE
        base = layer if is_taken else layer._replace(x=converted(layer.x, torch.float32))
        if layer.x.dtype not in WIDE:
            base = base._replace(inputs=widened(layer.inputs))
        example = readable_in_plan(base)
        self.shares = shares
        self.signature = s = self.signature_of(example, state_axes, components, layer.x.dtype)
        # After a whole sequence of a training step the weights are updated: it packs them for itself.
        caches_weights = not save or (s.T == 1 and (layer.x.dtype in WIDE or not components))
        self.caches = caches if caches_weights else None
        self.kernel = Forward(s, save, self.caches, part=part, directions=directions)
        self.backwards: dict[Any, Backward] = {}
        self.is_readable = all(map(is_, example.tensors, base.tensors))
        self.accumulates = layer.x.dtype is s.dtype is s.weight_dtype and not s.stack_size and sizes.sums_few_pairs(s)

    def signature_of(
        self, layer: Layer, state_axes: tuple[int, ...], components: int, rounded_dtype: torch.dtype
    ) -> Signature:
        """Return the signature of a layer for the share of the threads that a call has now."""
        s = signature_of(layer, state_axes, components)
        return s._replace(rounded_dtype=rounded_dtype, threads=max(1, s.threads // self.shares))

    def forward(self, layer: Layer) -> Run:
        return self.kernel.run(layer if self.is_readable else readable_in_plan(layer))

    def backward(
        self, grads: Run, layer: Layer, run: Run, needs: Gradients, form: list[Any], sums: Sequence[Any] = ()
    ) -> Gradients:
        """Return the gradients of a layer that this plan has run, in the type that the kernel takes."""
        kernel, frame = self.begin_backward(grads, layer, run, needs, form, sums)
        if frame.is_written:
            frame.run()
        return kernel.end(frame)

    def begin_backward(
        self, grads: Run, layer: Layer, run: Run, needs: Gradients, form: list[Any], sums: Sequence[Any] = ()
    ) -> tuple[Backward, Frame]:
        """Return the kernel for the backward pass of a layer that this plan has run, and a frame for it. Hooks of saved
        tensors may have moved the tensors, and the number of threads may have changed.
        """
        if form:
            kernel = form[0]
            return kernel, kernel.begin(grads, layer, run, form, sums)
        given, layer = layer, readable_in_plan(layer)
        now = strides(layer)
        key = needs, now, threads_now(), len(sums)
        kernel = self.backwards.get(key)
        if kernel is None:
            planned = self.signature
            s = self.signature_of(layer, planned.state_axes, planned.components, planned.rounded_dtype)
            kernel = self.backwards[key] = Backward(s, needs, s.stack_size is not None, self.caches, len(sums) > 0)
        is_readable = all(map(is_, layer.tensors, given.tensors))
        return kernel, kernel.begin(grads, layer, run, form if is_readable else None, sums)


class SixteenBits(Plan):
    """A plan for x and states of bfloat16 or float16. They are computed in float32, and results are rounded once."""

    def __init__(self, layer: Layer, *others: Any) -> None:
        super().__init__(layer, *others)
        self.dtype, self.reads_h = layer.x.dtype, self.is_bfloat16  # otherwise a float32 h is saved as well
        self.shapes = layer.x.shape, *self.kernel.state_shapes
        self.counts = [prod(shape) for shape in self.shapes]
        self.is_short = sum(self.counts) < SHORT
        self.views: dict[Any, list[Tensor]] = {}  # of each memory of `_wide_memory`

    def forward(self, layer: Any) -> Run:
        """Run a layer."""
        x, states = layer.x, layer.states
        copies: Any = None
        memory: Any
        if self.is_short and not self.is_bfloat16 and states[0] is not None:
            try:
                memory = _wide_memory.pop()  # atomic: Python threads may be here at once
            except IndexError:
                memory = None
            copies = self.views.get(memory)
            if copies is None:
                with torch.inference_mode(False):  # to be written to outside it as well
                    memory = torch.empty(SHORT, dtype=torch.float32, device="cpu") if memory is None else memory
                    parts = memory[: sum(self.counts)].split(self.counts)
                    copies = self.views[memory] = [part.view(shape) for part, shape in zip(parts, self.shapes)]
            copy_all(copies, [x, *states])
            x, *states = copies
        else:
            x, states = x if self.is_bfloat16 else converted(x, torch.float32), widened(states)
        h, last, saved = super().forward(layer._replace(x=x, states=states, inputs=widened(layer.inputs)))
        if copies is not None:
            _wide_memory.append(memory)
        if saved and h is not None and not self.is_bfloat16:
            saved = *saved, h  # which the backward pass reads, before it is rounded
        return Run(rounded(h, self.dtype), (*(a.to(self.dtype) for a in last),), saved)

    def backward(
        self, grads: Run, layer: Layer, run: Run, needs: Gradients, form: list[Any], sums: Sequence[Any] = ()
    ) -> Gradients:
        """Return the gradients of a layer that this plan has run. x is widened again, to save memory meanwhile."""
        x, dh, h, saved = layer.x, grads.h, run.h, [*run.saved]
        if not self.is_bfloat16:
            x, dh = converted(x, torch.float32), *widened((dh,))
            h = saved.pop() if x.dim() == 3 else None
        layer = layer._replace(x=x, states=widened(layer.states), inputs=widened(layer.inputs))
        grads = Run(dh, widened(grads.last), widened(grads.saved))
        gradients = super().backward(grads, layer, Run(h, run.last, (*saved,)), needs, form, sums)
        return Gradients.of(layer.cell, [rounded(a, self.dtype) for a in gradients.flat])


class ModulePlan:
    """Runs all layers and directions of a module, each with a `Plan`. The two directions of a layer run side by side,
    and so wait once and not after each step, where both together are worth a second thread.
    """

    backend: str
    types: Any
    saves_sequences = reads_h = True
    accumulates = False
    known: dict[Any, Any]
    loop: Any

    def __init__(
        self, layer: Layer, save: bool, caches: dict[Any, Any] | None, state_axes: tuple[int, ...], components: int
    ) -> None:
        D, x, parts = layer.directions, layer.x, examples(layer)
        example = signature_of(readable_in_plan(parts[0]), state_axes, components)
        panels = panels_of(example.H, lanes_of(example.dtype))
        self.runs_side_by_side = D == 2 and thread_split.runs_side_by_side(threads_now(), example, panels)
        self.save = save
        widths = example.h_width, *[example.H] * example.counts.inner_states
        self.new_states = [new_of((layer.parts, example.B, width), x.dtype) for width in widths]
        self.new_output = new_of((example.T, example.B, D * example.h_width), x.dtype)
        self.plans: list[Plan] = []
        for k, part in enumerate(parts):
            kept, shares = None if caches is None else caches.setdefault(k, {}), 2 if self.runs_side_by_side else 1
            self.plans.append(Plan(part, save, kept, state_axes, components, shares, k, D))
        self.kernels = [plan.kernel for plan in self.plans]
        self.is_readable = all(map(is_, readable_in_plan(layer).tensors, layer.tensors))

    def forward(self, layer: Layer) -> Run:
        layer = layer if self.is_readable else readable_in_plan(layer)
        x, D = layer.x, layer.directions
        last = tuple([new() for new in self.new_states])
        sequences: list[Tensor] = []
        gates: list[Tensor] = []
        for first in range(0, len(self.kernels), D):
            kernels, h = self.kernels[first : first + D], self.new_output()
            shared = x, h, *last
            frames = [kernel.begin(layer, shared) for kernel in kernels]
            run_frames(frames, self.runs_side_by_side)
            runs, x = [kernel.end(frame) for kernel, frame in zip(kernels, frames)], h
            if self.save:
                if first + D < len(self.kernels):
                    sequences.append(h)
                for run in runs:
                    sequences += run.saved[:-1]
                    gates.append(run.saved[-1])
        return Run(x, last, (*sequences, *gates))

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients, form: list[Any]) -> Gradients:
        form += [[] for _ in self.plans] if not form else ()  # one for each part
        return backward_of_parts(grads, layer, run, needs, partial(self._backward_of, form))

    def _backward_of(self, forms: list[list[Any]], first: int, arguments: list[Any]) -> list[Gradients]:
        """Return the gradients of the directions of one layer, of which `first` is the first part."""
        kernels, frames = [], []
        for plan, form, (grads, part, run, needs) in zip(self.plans[first:], forms[first:], arguments):
            kernel, frame = plan.begin_backward(grads, part, run, needs, form)
            kernels.append(kernel)
            frames.append(frame)
        run_frames(frames, self.runs_side_by_side and threads_now() > 1)
        return [kernel.end(frame) for kernel, frame in zip(kernels, frames)]


def readable_in_plan(layer: Layer) -> Layer:
    """Return `readable` with contiguous weights, since those of later calls may have other strides."""
    return readable(layer._replace(weights=(*map(contiguous, layer.weights),)))


def widened(tensors: tuple[Optional, ...]) -> tuple[Optional, ...]:
    """Return tensors of 16 bits in float32, and None as it is."""
    return (*(a if a is None else converted(a, torch.float32) for a in tensors),)


def rounded(a: Optional, dtype: torch.dtype) -> Optional:
    """Return a tensor in another type, and None as it is."""
    return a if a is None or a.dtype is dtype else converted(a, dtype, unpooled)


def plan(
    layer: Layer, save: bool, caches: dict[Any, Any] | None, state_axes: tuple[int, ...], components: int = 0
) -> Plan | ModulePlan:
    """Prepare calls like this one: of the same shapes, strides of x, types, contiguity and presence of each tensor, and
    number of threads.

    Args:
        layer: an example, whose x is (T, B, I), or (B, I) for one step alone. A step's run has no ``h``. One of several
            parts has an x (T, B, I) of float32 or float64, and no inputs.
        save: whether runs save what the backward pass reads.
        caches: the caches of packed weights, which all plans of a layer share; with None each call packs its weights.
        state_axes: the leading axes of the states, ``(1,)`` or ``()``.
        components: see `forward`.
    """
    if layer.parts > 1:
        return ModulePlan(layer, save, caches, state_axes, components)
    kind = Plan if layer.x.dtype in WIDE else SixteenBits
    return kind(layer, save, caches, state_axes, components)
