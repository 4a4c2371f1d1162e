"""Plans for calls of one signature: what Triton finds out at every launch is found out once.

Triton's own launch looks at the type and the address of every argument, and so finds the compiled kernel. That takes
longer than all that a launch then does. What it looks at follows from the signature of a call, but for two things:

* which gradients came in and are wanted, for which there is a key, and
* how addresses are aligned, which is the same for all tensors that reach a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from fastlstm.backends.base import Gradients, Layer, Run
from fastlstm.backends.triton import backward, forward, resolve_precision
from fastlstm.backends.triton.launch import start_anew


class Starter:
    """Starts the kernels of passes whose tensors are alike in type, in device, and in which of them are there.

    A kernel's first start is Triton's own. Later ones call what that has compiled, which still looks up the current
    stream and calls Triton's hooks. So the constants of a kernel are those of its first start on a grid. In the
    interpreter there is nothing compiled, and all starts are Triton's own.
    """

    def __init__(self) -> None:
        self._ready: dict[Any, tuple[Callable[..., object], tuple[Any, ...]]] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """See `launch.start_anew`."""
        ready = self._ready.get((id(kernel), grid))  # the kernel's hash would be that of its source
        if ready is not None:
            run, constants = ready
            run(*arguments, *constants)
            return
        compiled = start_anew(kernel, grid, *arguments, **options)
        if isinstance(compiled, triton.compiler.CompiledKernel):
            constants = tuple([options[name] for name in kernel.arg_names[len(arguments) :]])
            self._ready[id(kernel), grid] = compiled[(*grid, 1, 1)[:3]], constants


class Plan:
    """How calls like an example run. See `fastlstm.backends.base.Plan`."""

    backend: str
    reads_h = True

    def __init__(self, layer: Layer, save: bool, ends: tuple[int, ...], precision: str | None) -> None:
        """See `plan`."""
        self.save, self.ends, self.precision, self.dtype = save, ends, precision, layer.x.dtype
        self.step = layer.x.dim() == 2
        self.keeps_cells = not self.step and self.dtype is torch.float32
        self.starters: dict[Any, Starter] = {}

    def forward(self, layer: Layer) -> Run:
        """Run a layer."""
        precision = resolve_precision(self.dtype, self.precision)
        run = forward(self._seen(layer), self.save, precision, self._starter(precision), self.ends)
        if not self.step:
            return run
        return run._replace(h=None, kept=(*run.kept, run.h) if self.save else ())  # some cells read h after the step

    def backward(self, grads: Run, layer: Layer, run: Run, needs: Gradients) -> Gradients:
        """The gradients of a layer that this plan has run."""
        precision = resolve_precision(self.dtype, self.precision)
        given = tuple([a is not None for a in (grads.h, *grads.last, *grads.kept)])
        if self.step:
            *kept, h = run.kept
            run = run._replace(h=h, kept=tuple(kept))
        starter = self._starter((precision, given, needs))
        found = backward(grads, self._seen(layer), run, needs, precision, starter)
        return found._replace(x=found.x.view_as(layer.x)) if self.step and found.x is not None else found

    def _starter(self, key: Any) -> Starter:
        return self.starters.get(key) or self.starters.setdefault(key, Starter())

    def _seen(self, layer: Layer) -> Layer:
        """A layer of (T, B, I) whose weights have its type."""
        if self.step:
            layer = layer._replace(x=layer.x.unsqueeze(0))
        if any(a is not None and a.dtype is not self.dtype for a in layer.weights):
            layer = layer._replace(weights=tuple(a if a is None else a.to(self.dtype) for a in layer.weights))
        return layer
