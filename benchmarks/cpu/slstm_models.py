"""TiRex and its sLSTM cell, before and after `fastlstm.integrations.xlstm.accelerate`: their speed, side by side.

python -m benchmarks.cpu.slstm_models [--rounds 15]

The weights are random, and the sizes are those of the published model: 12 blocks of 4 heads of 128 units, which see 64
patches of 32 numbers. TiRex's own cell computes in bfloat16, and ours in float32. A step of training is forward and
backward. xLSTM's cell in float32 is the third. TiRex's own forecast takes 10 s at B 64, so that its row takes minutes.
`pip install .[integrations]` installs both packages.
"""

from collections.abc import Callable, Iterator

import torch
from tirex.models.slstm.cell import sLSTMBlockConfig
from tirex.models.slstm.cell import sLSTMCell as CellOfTiRex
from tirex.models.tirex import TiRexZero
from torch import nn
from xlstm.blocks.slstm.cell import sLSTMCell as CellOfXLSTM
from xlstm.blocks.slstm.cell import sLSTMCellConfig

from benchmarks.shared.calls import inference
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm.integrations.xlstm import accelerate

T, HEADS, UNITS, PATCH, BLOCKS = 64, 4, 512, 32, 12


def drawn(module: nn.Module) -> nn.Module:
    """Return a module with random weights."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.05)
    return module


def tirex() -> nn.Module:
    block = {"num_blocks": BLOCKS, "embedding_dim": UNITS, "num_heads": HEADS}
    sizes = {"input_patch_size": PATCH, "output_patch_size": PATCH, "input_ff_dim": 2048, "block_kwargs": block}
    return drawn(TiRexZero("torch", {**sizes, "quantiles": [k / 10 for k in range(1, 10)]}, train_ctx_len=T * PATCH))


CELLS: dict[str, Callable[[], nn.Module]] = {
    "TiRex's cell": lambda: CellOfTiRex(sLSTMBlockConfig(embedding_dim=UNITS, num_heads=HEADS), "torch"),
    "xLSTM's cell": lambda: CellOfXLSTM(sLSTMCellConfig(hidden_size=UNITS, num_heads=HEADS, backend="vanilla")),
}


def call_of(model: nn.Module, B: int, mode: str) -> Run:
    """Return a forecast of one patch by TiRex, or a call of a cell, with its backward pass in training."""
    if isinstance(model, TiRexZero):
        context = torch.randn(B, T * PATCH)
        return lambda: model.forecast(context, prediction_length=PATCH)
    x = torch.randn(B, T, 4 * UNITS, requires_grad=mode == "training")

    def step() -> None:
        model.zero_grad()
        model(x, state=None)[0].square().mean().backward()

    return step if mode == "training" else inference(lambda: model(x, state=None))


def rows(options: Options) -> Iterator[list[str]]:
    calls = [("TiRex's forecast", tirex, B, "inference") for B in (1, 64)]
    calls += [(name, cell, B, mode) for name, cell in CELLS.items() for B in (1, 16, 64) for mode in MODES]
    for name, build, B, mode in calls:
        torch.manual_seed(0)
        theirs, ours = build(), build()
        ours.load_state_dict(drawn(theirs).state_dict())
        runs = {"theirs": call_of(theirs, B, mode), "ours": call_of(accelerate(ours), B, mode)}
        sides = compare(runs, options.rounds, options.threads, limit=options.seconds)
        yield [name, f"B {B}", mode, sides["theirs"].ms, sides["ours"].ms, str(sides["ours"].to(sides["theirs"]))]


if __name__ == "__main__":
    arguments = parser("cpu.slstm_models", __doc__, rounds=15)
    arguments.add_argument("--seconds", type=float, default=30, help="after which a row begins no further round (30)")
    print_table(["what", "batch", "call", "before", "after", "ratio"], rows(arguments.parse_args()))
