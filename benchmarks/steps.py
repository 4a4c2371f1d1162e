"""A time step a call: fastlstm.LSTMCell against torch.nn.LSTMCell, alone and in a loop that is trained.

python -m benchmarks.steps [--pairs 31]
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.clock import Contender, interleaved, ratio_of

SIZES = [(1, 128, 128), (1, 128, 512), (16, 64, 64), (32, 128, 256), (128, 128, 256), (8, 512, 512), (128, 512, 512)]
STEPS = 20


def call(cell: nn.Module, xs: Tensor) -> Callable[[], object]:
    state = torch.rand(2, xs.shape[1], cell.hidden_size).unbind()  # as in the midst of a sequence: zeros cost less

    def run() -> object:
        with torch.no_grad():
            return cell(xs[0], state)

    return run


def training(cell: nn.Module, xs: Tensor) -> Callable[[], object]:
    """A loop over the steps and its backward pass. The gradients are dropped, the weights stay."""
    parameters = list(cell.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        state = (xs.new_zeros(xs.shape[1], cell.hidden_size),) * 2
        for x in xs:
            state = cell(x, state)
        state[0].sum().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=31)
    options, threads = parser.parse_args(), torch.get_num_threads()
    print("| B, I, H | a call without gradients | a step of a loop, forward and backward |\n|---|---|---|")
    for B, I, H in SIZES:
        theirs, ours = nn.LSTMCell(I, H), fastlstm.LSTMCell(I, H)
        ours.load_state_dict(theirs.state_dict())
        xs, cells = torch.randn(STEPS, B, I), []
        for a, b in zip(theirs(xs[0]), ours(xs[0]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        for kind, steps in ((call, 1), (training, STEPS)):
            contenders = {name: Contender(kind(cell, xs), threads) for name, cell in (("nn", theirs), ("ours", ours))}
            times = interleaved(contenders, options.pairs)
            ratio = ratio_of(times["nn"], times["ours"])
            us = {name: statistics.median(values) / steps * 1e6 for name, values in times.items()}
            cells.append(
                f"{us['nn']:.0f} and {us['ours']:.0f} us, **{ratio.median:.2f}** ({ratio.low:.2f}–{ratio.high:.2f})"
            )
        print(f"| {B}, {I}, {H} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
