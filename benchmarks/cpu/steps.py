"""A time step a call: fastlstm.LSTMCell against torch.nn.LSTMCell, alone and in a loop that is trained.

python -m benchmarks.cpu.steps [--rounds 31]
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.shared.calls import check, inference, training
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table

SIZES = [(1, 128, 128), (1, 128, 512), (16, 64, 64), (32, 128, 256), (128, 128, 256), (8, 512, 512), (128, 512, 512)]
STEPS = 20


def prepared(cell: nn.Module, xs: Tensor, mode: str) -> Run:
    """Return a call without gradients, or a loop over the steps with its backward pass."""
    if mode == "inference":  # in the midst of a sequence: a state of zeros costs less
        state = torch.rand(2, xs.shape[1], cell.hidden_size).unbind()
        return inference(lambda: cell(xs[0], state))

    def loop() -> Tensor:
        state = (xs.new_zeros(xs.shape[1], cell.hidden_size),) * 2
        for x in xs:
            state = cell(x, state)
        return state[0].sum()

    return training(loop, cell.parameters())


def runs(B: int, I: int, H: int, mode: str) -> dict[str, Run]:
    """Return both sides' calls, whose results are the same."""
    theirs, ours = nn.LSTMCell(I, H), fastlstm.LSTMCell(I, H)
    ours.load_state_dict(theirs.state_dict())
    xs = torch.randn(STEPS, B, I)
    check(ours(xs[0]), theirs(xs[0]), 1e-5)
    return {"torch": prepared(theirs, xs, mode), "fastlstm": prepared(ours, xs, mode)}


def rows(options: Options) -> Iterator[list[str]]:
    for size in SIZES:
        cells = []
        for mode, steps in zip(MODES, (1, STEPS)):
            sides = compare(runs(*size, mode), options.rounds, options.threads)
            us = [f"{side.seconds / steps * 1e6:.0f}" for side in sides.values()]
            cells.append(f"{' and '.join(us)} us, {sides['fastlstm'].to(sides['torch'])}")
        yield [", ".join(map(str, size)), *cells]


if __name__ == "__main__":
    header = ["B, I, H", "a call without gradients", "a step of a loop, forward and backward"]
    print_table(header, rows(parser("cpu.steps", __doc__).parse_args()))
