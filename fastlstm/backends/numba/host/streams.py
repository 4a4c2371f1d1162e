"""Single steps of one layer whose weights stay packed, and whose states stay where they are.

A step writes two addresses into arguments that are ready, and runs the kernel. The new states replace those that the
step started from: the kernel reads a state for the last time before it writes the first number of the new one.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlstm.backends.base import WEIGHTS, Layer
from fastlstm.backends.numba.host.forward import Forward
from fastlstm.backends.numba.host.frames import Kernel
from fastlstm.backends.numba.host.kept_weights import addresses
from fastlstm.backends.numba.host.signature import contiguous, readable, signature_of


class Steps:
    """Runs single steps: called with the addresses of x (B, I) and of h (B, H), which it writes."""

    def __init__(self, kernel: Kernel, holds: Any) -> None:
        """`holds`: what must live as long as the steps do, beside the kernel."""
        self.kernel, self.holds, self.frame = kernel, holds, kernel.keep()
        self.meets = kernel.counters > 0
        self.words = memoryview(self.frame.arguments).cast("B").cast("q")
        fields = type(self.frame.arguments)
        self.x, self.h, self.flip = (getattr(fields, name).offset // 8 for name in ("x", "h", "flip"))

    def __call__(self, x: int, h: int) -> None:
        words = self.words
        words[self.x], words[self.h] = x, h
        words[self.flip] ^= 1  # to and fro: the weights that were read last are still in the cache
        if self.meets:
            self.frame.count_anew()
        self.frame.run()


def steps(layer: Layer, kept: dict[Any, Any]) -> Steps:
    """Prepare the steps of a layer of float32 or float64, whose weights do not change.

    Args:
        layer: x (B, I) and states (B, H), contiguous. The steps read and write these very states.
        kept: where the packed weights stay, in case that the steps are prepared again.
    """
    first, *others = layer.states
    with torch.inference_mode(False), torch.no_grad():
        layer = readable(layer._replace(x=layer.x.unsqueeze(0), weights=(*map(contiguous, layer.weights),)))
        forward = Forward(signature_of(layer, (), 0)._replace(unit=False), False, kept, holds=True)
        keeper: Any = forward.keeper
        if keeper.packed is None:
            forward.run(layer)  # which packs the weights
        *of_weights, _ = keeper.packed.addresses
        made = Steps(forward.kernel, (keeper.packed, layer))
        call = [0, first.data_ptr(), forward.row, 0, 0, 0, 0, first.data_ptr(), 0]
        for state in others:
            call += state.data_ptr(), forward.row, state.data_ptr(), state.data_ptr()
        if forward.has_values:
            told, values = forward.values(layer)
            call += told
            made.holds = *made.holds, values
        forward.write_kept(
            made.frame.arguments, forward.at_kept, *of_weights, 0, made.frame.stale, 0, 0, 0, 0,
            *addresses(layer.weights[:WEIGHTS]), *call,
        )  # fmt: skip
    return made
