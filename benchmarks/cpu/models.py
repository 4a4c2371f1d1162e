"""Models that others wrote, before and after `fastlstm.replace`: their speed, side by side, on the CPU.

python -m benchmarks.cpu.models [--only Demucs ...] [--rounds 15]

A training step is forward, backward and Adam's step; inference runs in eval mode without gradients. Models whose
package is not installed are left out: `pip install .[models]`.
"""

import importlib.util
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

import fastlstm
from benchmarks.cpu.third_party import MODELS
from benchmarks.cpu.third_party import Run as Call
from benchmarks.shared.calls import inference
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table


def prepared(model: nn.Module, call: Call, mode: str) -> Run:
    optimizer = torch.optim.Adam(model.parameters())

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        torch.stack([output.square().mean() for output in call(model)]).sum().backward()
        optimizer.step()

    return step if mode == "training" else inference(lambda: call(model.eval()))


def rows(options: Options) -> Iterator[list[str]]:
    for name in options.only:
        chosen = MODELS[name]
        if importlib.util.find_spec(chosen.package) is None:
            yield [name, f"left out: {chosen.package} is not installed", "", "", ""]
            continue
        torch.manual_seed(0)
        theirs, call = chosen.build()
        ours = fastlstm.replace(deepcopy(theirs), keep_type=chosen.keep_type)
        for mode in MODES:
            runs = {"theirs": prepared(theirs, call, mode), "ours": prepared(ours, call, mode)}
            sides = compare(runs, options.rounds, options.threads)
            yield [name, mode, sides["theirs"].ms, sides["ours"].ms, str(sides["ours"].to(sides["theirs"]))]


if __name__ == "__main__":
    arguments = parser("cpu.models", __doc__, rounds=15)
    arguments.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    print_table(["model", "call", "before", "after", "ratio"], rows(arguments.parse_args()))
