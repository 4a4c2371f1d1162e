"""Single steps of one layer whose weights stay packed, and whose states are updated in place: the kernel reads a state
for the last time before it writes the first number of the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlstm.backends.base import Layer
from fastlstm.backends.numba.host.forward import Forward
from fastlstm.backends.numba.host.signature import contiguous, readable, signature_of


class StepRunner:
    """Runs prepared single steps: called with two addresses, it reads x (B, I) at the first and writes the output h (B,
    H) to the second. The states that it keeps are updated too, h among them.
    """

    packs_weights = False  # all that run on the same weights share their packed copy

    def __init__(self, forward: Forward, layer: Layer) -> None:
        example = forward.begin(layer)
        self.forward, self.frame, self.keep_alive = forward, forward.own_frame(), example.call
        self.has_barriers = forward.barrier_bytes > 0
        self.fields = memoryview(self.frame.arguments).cast("B").cast("q")
        struct = type(self.frame.arguments)
        first = struct.packed.offset // 8  # of the fields of a call, which are the last
        self.fields[first:] = memoryview(example.arguments).cast("B").cast("q")[first:]
        self.frame.arguments.digests, self.frame.arguments.mismatches = 0, self.frame.mismatches  # nothing is compared
        forward.take_back(example)
        # each field's index among the 64-bit fields of the struct
        self.x, self.h, self.flip, self.h_0, self.h_n = (
            getattr(struct, name).offset // 8 for name in ("x", "h", "flip", "h_0", "h_n")
        )
        self.inner_states = [
            (k + 1, *(getattr(struct, f"{name}{k}").offset // 8 for name in ("initial", "sequence", "last")))
            for k in range(len(layer.states) - 1)
        ]
        states = [a.data_ptr() for a in layer.states]
        self.set_states(states, states)

    def set_states(self, before: Sequence[int], after: Sequence[int]) -> None:
        """Let later steps read the states at other addresses, and write the new ones to `after`."""
        fields = self.fields
        fields[self.h_0], fields[self.h_n] = before[0], after[0]
        for k, initial, sequence, last in self.inner_states:
            fields[initial] = before[k]
            fields[sequence] = fields[last] = after[k]

    def __call__(self, x: int, h: int) -> None:
        fields = self.fields
        fields[self.x], fields[self.h] = x, h
        fields[self.flip] ^= 1  # serpentine order: the weights that were read last are still in the cache
        if self.has_barriers:
            self.frame.reset_barriers()
        self.frame.run()


def steps(layer: Layer, caches: dict[Any, Any]) -> StepRunner:
    """Prepare the steps of a layer of float32 or float64, whose weights do not change. x is (B, I), and the steps read
    and write its very states (B, H), contiguous both. `caches`: the packed weights, kept by the caller for the next
    time.
    """
    # tensors made here live on, and those made in inference mode could not be written to outside it
    with torch.inference_mode(False), torch.no_grad():
        layer = readable(layer._replace(x=layer.x.unsqueeze(0), weights=(*map(contiguous, layer.weights),)))
        signature = signature_of(layer, (), 0)
        forward = Forward(signature, False, caches, always_caches=True)
        cache: Any = forward.cache
        if cache.packed is None:
            forward.run(layer)  # packs the weights
        return StepRunner(forward, layer)
