"""Layers of libraries that loop over time, before and after their integration: their speed, side by side, on the CPU.

python -m benchmarks.cpu.library_loops [--only ncps] [--rounds 15]

A step of training is forward and backward. The libraries come with `pip install .[integrations]`; those that are not
installed are left out.
"""

import copy
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.shared.calls import inference
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm.integrations import ncps, torchrecurrent, xlstm

Case = tuple[str, str, Any, Any, torch.Tensor]  # what, the size, before, after, the input


def of_ncps() -> Iterator[Case]:
    from ncps.torch import CfC
    from ncps.wirings import AutoNCP

    models = {"AutoNCP(64, 8)": CfC(16, AutoNCP(64, 8)), "64 units": CfC(16, 64, backbone_layers=0)}
    for name, model in models.items():
        yield (
            f"CfC, {name}",
            "T 100, B 32, I 16",
            model,
            ncps.accelerate(copy.deepcopy(model)),
            torch.randn(32, 100, 16),
        )


def of_torchrecurrent() -> Iterator[Case]:
    import torchrecurrent as library

    for name in ("JANET", "NAS", "STAR", "LiGRU"):
        model = getattr(library, name)(128, 128)
        ours = torchrecurrent.accelerate(copy.deepcopy(model))
        yield name, "T 100, B 32, I 128, H 128", model, ours, torch.randn(100, 32, 128)


def of_tirex2() -> Iterator[Case]:
    from tirex2.model.component import FlashRNNLayerConfig, sLSTMFlashRNNLayer

    shapes = {"recurrent_shape": "HPGD", "bias_shape": "HGD"}
    model = sLSTMFlashRNNLayer(FlashRNNLayerConfig(512, num_heads=4, backend="vanilla", **shapes), 0, 2)
    ours = xlstm.accelerate(copy.deepcopy(model))
    yield "sLSTM layer", "T 64, B 1, 4 heads of 128 units", model, ours, torch.randn(1, 64, 512)


LIBRARIES: dict[str, Callable[[], Iterator[Case]]] = {
    "ncps": of_ncps,
    "torchrecurrent": of_torchrecurrent,
    "tirex2": of_tirex2,
}


def call_of(model: Any, x: torch.Tensor, mode: str) -> Run:
    def step() -> None:
        model.zero_grad()
        model(x)[0].square().mean().backward()

    return step if mode == "training" else inference(lambda: model(x))


def rows(options: Options) -> Iterator[list[str]]:
    for library in options.only:
        if find_spec(library) is None:
            continue
        torch.manual_seed(0)
        for name, size, theirs, ours, x in LIBRARIES[library]():
            for mode in MODES:
                calls = {"theirs": call_of(theirs, x, mode), "ours": call_of(ours, x, mode)}
                sides = compare(calls, options.rounds, options.threads, limit=options.seconds)
                ratio = str(sides["ours"].to(sides["theirs"]))
                yield [library, name, size, mode, sides["theirs"].ms, sides["ours"].ms, ratio]


if __name__ == "__main__":
    arguments = parser("cpu.library_loops", __doc__, rounds=15)
    arguments.add_argument("--seconds", type=float, default=30, help="after which a row begins no further round (30)")
    arguments.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    print_table(["library", "what", "size", "call", "before", "after", "ratio"], rows(arguments.parse_args()))
