"""Single steps of one layer whose weights stay packed, and whose states are updated in place: the kernel reads a state
for the last time before it writes the first number of the new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlstm.backends.base import WEIGHTS, Layer
from fastlstm.backends.cpu import address
from fastlstm.backends.numba.host.forward import Forward
from fastlstm.backends.numba.host.frames import Kernel
from fastlstm.backends.numba.host.signature import contiguous, readable, signature_of


class StepRunner:
    """Runs prepared single steps: called with two addresses, it reads x (B, I) at the first and writes the output h (B,
    H) to the second. The states that it keeps are updated too, h among them.
    """

    packs_weights = False  # all that run on the same weights share their packed copy

    def __init__(self, kernel: Kernel, keep_alive: Any, inner_states: int) -> None:
        """`keep_alive`: the objects that must live as long as the runner does, beside the kernel."""
        self.kernel, self.keep_alive, self.frame = kernel, keep_alive, kernel.own_frame()
        self.has_barriers = kernel.barrier_bytes > 0
        self.fields = memoryview(self.frame.arguments).cast("B").cast("q")
        struct = type(self.frame.arguments)
        # each field's index among the 64-bit fields of the struct
        self.x, self.h, self.flip, self.h_0, self.h_n = (
            getattr(struct, name).offset // 8 for name in ("x", "h", "flip", "h_0", "h_n")
        )
        self.inner_states = [
            (k + 1, *(getattr(struct, f"{name}{k}").offset // 8 for name in ("initial", "sequence", "last")))
            for k in range(inner_states)
        ]

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
    first, *inner = layer.states
    # tensors made here live on, and those made in inference mode could not be written to outside it
    with torch.inference_mode(False), torch.no_grad():
        layer = readable(layer._replace(x=layer.x.unsqueeze(0), weights=(*map(contiguous, layer.weights),)))
        signature = signature_of(layer, (), 0)._replace(allows_bf16_unit=False)
        forward = Forward(signature, False, caches, always_caches=True)
        cache: Any = forward.cache
        if cache.packed is None:
            forward.run(layer)  # packs the weights
        *packed_addresses, _ = cache.packed.addresses
        runner = StepRunner(forward.kernel, (cache.packed, layer), len(inner))
        row_bytes = forward.state_row_bytes
        call = [
            0, first.data_ptr(), forward.h_0_row_bytes,  # x, h_0 and its row stride
            0, 0, 0, 0, forward.h_row_bytes, 0,  # lengths, reset; h and its strides; gates
            first.data_ptr(), 0,  # h_n, flip
        ]  # fmt: skip
        for state in inner:
            # initial and its row stride, sequence, last
            call += state.data_ptr(), row_bytes, state.data_ptr(), state.data_ptr()
        if forward.has_operands:
            field_values, operands = forward.operand_fields(layer.inputs, layer.weights)
            call += field_values
            runner.keep_alive = *runner.keep_alive, operands
        no_digests, no_weights = 0, (0, 0, 0, 0, 0)  # packed weights are neither compared nor packed again
        forward.write_cached_call(
            runner.frame.arguments, forward.cached_call_offset, *packed_addresses, no_digests,
            runner.frame.mismatches, *no_weights, *map(address, (*layer.weights[:WEIGHTS], None)), *call,
        )  # fmt: skip
    return runner
