"""Models that others wrote, before and after `fastlstm.replace_lstm`: their speed, side by side, on the CPU.

python -m benchmarks.models [--only Demucs ...] [--rounds 15]

A training step is forward, backward and Adam's step; inference runs in eval mode without gradients. Models whose
package is not installed are left out: `pip install .[models]`.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import nn

import fastlstm
from benchmarks.clock import Contender, interleaved, ratio_of
from benchmarks.third_party import MODELS, Run, ThirdParty


def training_step(model: nn.Module, run: Run) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        torch.stack([output.square().mean() for output in run(model)]).sum().backward()
        optimizer.step()

    return step


def inference(model: nn.Module, run: Run) -> Callable[[], None]:
    def call() -> None:
        model.eval()
        with torch.no_grad():
            run(model)

    return call


def measure(chosen: ThirdParty, threads: int, rounds: int) -> Iterator[tuple[str, str]]:
    """For each mode its name and what was measured, as a line of text."""
    torch.manual_seed(0)
    theirs, run = chosen.build()
    ours = fastlstm.replace_lstm(deepcopy(theirs), keep_type=chosen.keep_type)
    for prepare in (training_step, inference):
        contenders = {
            "theirs": Contender(prepare(theirs, run), threads),
            "ours": Contender(prepare(ours, run), threads),
        }
        times = interleaved(contenders, rounds)
        before, after = (statistics.median(times[name]) * 1e3 for name in ("theirs", "ours"))
        ratio = ratio_of(times["theirs"], times["ours"])
        yield (
            prepare.__name__.replace("_", " "),
            f"{before:8.1f} {after:8.1f} ms, {ratio.median:.2f} times ({ratio.low:.2f} to {ratio.high:.2f})",
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="as torch chooses")
    options = parser.parse_args()
    for name in options.only:
        if importlib.util.find_spec(MODELS[name].package) is None:
            print(f"{name:28} left out: {MODELS[name].package} is not installed")
            continue
        for mode, result in measure(MODELS[name], options.threads, options.rounds):
            print(f"{name:28} {mode:14} {result}", flush=True)


if __name__ == "__main__":
    main()
