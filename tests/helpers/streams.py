"""The steps of a stream beside the module's own."""

import torch

from tests.helpers.modules import flat
from tests.helpers.tolerances import equal


def next_step(module, rows, state):
    """Draw x and the cell's inputs of one step. Return them, and h and the state by the module's own step."""
    like = next(a for a in [*module.parameters(), *module.buffers()] if a.is_floating_point())
    x = torch.randn(rows, module.input_size, dtype=like.dtype) if module.input_size else None
    inputs = {name: torch.rand(rows, module.hidden_size, dtype=like.dtype) for name in module._cell.inputs}
    options = {"inputs": inputs} if inputs else {}
    if not hasattr(module, "step"):  # a cell
        state = module(x, state)
        return x, options, flat(state)[0], state
    return x, options, *module.step(x, state, **options)


@torch.no_grad()
def check_bits(module, B, stream=None, rows=None):
    """Steps on the stream's own states, then on those of a caller with some numbers of rows, are the module's own."""
    stream, state = stream or module.stream(B), None
    if stream.batch_size == B:
        stream.reset()
        for _ in range(5):
            x, options, h, state = next_step(module, B, state)
            equal([stream(x, **options), *flat(stream.state)], [h, *flat(state)])
    before = stream.state
    for count in rows or (B + 1,):
        state = own = None
        for _ in range(4):
            x, options, h, state = next_step(module, count, state)
            given = [] if own is None else [a.clone() for a in flat(own)]
            got, after = stream.step(x, own, **options)
            equal(given, [] if own is None else flat(own))  # which the step has only read
            assert type(after) is type(state)
            equal([got, *flat(after)], [h, *flat(state)])
            own = after
    equal(stream.state, before)
