"""Cells with norms, and layers of heads, against the same in plain PyTorch.

python -m benchmarks.cpu.norms_and_heads [--only norms heads norms_of_heads] [--rounds 15]

Norms: `layer_norm_lstm` and `dreamer_gru` against a loop over time with `torch.nn.functional.layer_norm`, in which x is
multiplied for all steps at once. The last column has what norms cost: the time beside `peephole_lstm` or `gru`, whose
products are the same. Heads: an sLSTM with 4 heads of 128 units, whose x comes as inputs, against a loop with one
`torch.bmm` a step. Norms of heads: an LSTM with as many heads, each of which normalizes its units of the cell state,
against such a loop. Its last column is the time beside the same cell with a norm over all units. Every rival is checked
before the clock starts. All run on one thread and on all in every round, and the faster counts.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastlstm
from benchmarks.shared.calls import called, check
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm import cells

SIZES = ((28, 128, 28, 128), (100, 16, 64, 256), (50, 1, 40, 128), (50, 16, 512, 512), (50, 64, 1024, 1024))
BATCHES, STEPS, HEADS, UNITS = (1, 16, 64), 64, 4, 128
TOLERANCE = 2e-3  # sums of up to 6400 terms, whose roundings grow over 100 steps of normalised states
Runs = dict[str, Run]  # by mode


def plain_layer_norm_lstm(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`layer_norm_lstm` as one writes it in PyTorch."""
    H = weights["weight_hh"].shape[1]
    gain_x, gain_h = (torch.cat([weights[f"gain_{gate}_{kind}"] for gate in "ifgo"]) for kind in "xh")
    bias = torch.cat([weights[f"bias_{gate}"] for gate in "ifgo"])
    from_x = F.layer_norm(F.linear(x, weights["weight_ih"], weights["bias_ih"]), (4 * H,), gain_x, bias)
    h = c = x.new_zeros(x.shape[1], H)
    outputs = []
    for part in from_x.unbind(0):
        from_h = F.linear(h, weights["weight_hh"], weights["bias_hh"])
        i, f, g, o = (part + F.layer_norm(from_h, (4 * H,), gain_h)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, (H,), weights["gain_c"], weights["bias_c"]))
        outputs.append(h)
    return torch.stack(outputs)


def plain_dreamer_gru(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`dreamer_gru` as one writes it in PyTorch."""
    H = weights["weight_hh"].shape[1]
    gain, bias = (torch.cat([weights[f"{kind}_{gate}"] for gate in "rnu"]) for kind in ("gain", "bias"))
    from_x = F.linear(x, weights["weight_ih"], weights["bias_ih"] + weights["bias_hh"])
    h = x.new_zeros(x.shape[1], H)
    outputs = []
    for part in from_x.unbind(0):
        gates = torch.addmm(part, h, weights["weight_hh"].t())
        r, n, u = F.layer_norm(gates, (3 * H,), gain, bias, 1e-3).chunk(3, 1)
        h = torch.lerp(h, torch.tanh(torch.sigmoid(r) * n), torch.sigmoid(u - 1))
        outputs.append(h)
    return torch.stack(outputs)


def plain_heads(inputs: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    """`slstm_of_inputs` as one writes it in PyTorch: one product a step for all heads."""
    B, H = inputs[0].shape[1:]
    blocks = weight.view(4, HEADS, UNITS, UNITS).permute(1, 3, 0, 2).reshape(HEADS, UNITS, 4 * UNITS)
    h = c = n = m = inputs[0].new_zeros(B, H)
    outputs = []
    for x_i, x_f, x_z, x_o in zip(*(a.unbind(0) for a in inputs)):
        sums = torch.bmm(h.view(B, HEADS, UNITS).transpose(0, 1), blocks).view(HEADS, B, 4, UNITS).permute(2, 1, 0, 3)
        i, f, z, o = (part.reshape(B, H) + a for part, a in zip(sums, (x_i, x_f, x_z, x_o)))
        f_log = F.logsigmoid(f) + m
        m = torch.maximum(f_log, i)
        i, f = torch.exp(i - m), torch.exp(f_log - m)
        c, n = f * c + i * torch.tanh(z), f * n + i
        h = torch.sigmoid(o) * c / n
        outputs.append(h)
    return torch.stack(outputs)


@cells.cell(gates=dict.fromkeys("ifzo", "h"), states=("h", "c", "n", "m"), inputs=("x_i", "x_f", "x_z", "x_o"))
def slstm_of_inputs(i: Any, f: Any, z: Any, o: Any, c: Any, n: Any, m: Any, x_i: Any, x_f: Any, x_z: Any, x_o: Any):
    """`slstm` without a product of x: what x adds to the pre-activations comes as inputs."""
    return cells.slstm(z + x_z, i + x_i, f + x_f, o + x_o, c, n, m)


def normed_lstm(of: str) -> cells.Cell:
    """Return an LSTM with a norm of its cell state over the units of a row or of a head."""

    @cells.cell(gates=dict.fromkeys("ifgo", "xh"), states=("h", "c"), params={"gain": 1.0, "shift": 0.0})
    def normed(i: Any, f: Any, g: Any, o: Any, c: Any, gain: Any, shift: Any) -> tuple[Any, Any]:
        c = cells.sigmoid(f) * c + cells.sigmoid(i) * cells.tanh(g)
        return cells.sigmoid(o) * cells.layer_norm(c, weight=gain, bias=shift, of=of), c

    return normed


def plain_normed_lstm(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """`normed_lstm` of heads as one writes it in PyTorch."""
    B, H, gain, shift = x.shape[1], HEADS * UNITS, weights["gain"], weights["shift"]
    blocks = weights["weight_hh"].view(4, HEADS, UNITS, UNITS).permute(1, 3, 0, 2).reshape(HEADS, UNITS, 4 * UNITS)
    h = c = x.new_zeros(B, H)
    outputs = []
    for part in F.linear(x, weights["weight_ih"], weights["bias_ih"] + weights["bias_hh"]).unbind(0):
        sums = torch.bmm(h.view(B, HEADS, UNITS).transpose(0, 1), blocks).view(HEADS, B, 4, UNITS).permute(1, 2, 0, 3)
        i, f, g, o = (part + sums.reshape(B, 4 * H)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        normed = F.layer_norm(c.view(B, HEADS, UNITS), (UNITS,)).view(B, H)
        h = torch.sigmoid(o) * torch.addcmul(shift, normed, gain)
        outputs.append(h)
    return torch.stack(outputs)


def calls(call: Callable[[], Tensor], leaves: list[Tensor]) -> Runs:
    return {mode: called(mode, call, leaves) for mode in MODES}


def layer(cell: cells.Cell, x: Tensor, H: int, heads: int = 1) -> tuple[nn.Module, Runs]:
    """Return a layer of a cell, and its calls."""
    rnn = fastlstm.RNN(cell, x.shape[-1], H, heads=heads, backend="numba")
    return rnn, calls(lambda: rnn(x)[0], list(rnn.parameters()))


def norms() -> Iterator[tuple[str, dict[str, Runs]]]:
    """Yield what each row of cells with norms is called, and what runs."""
    lstm = cells.layer_norm_lstm, plain_layer_norm_lstm, cells.peephole_lstm
    gru = cells.dreamer_gru, plain_dreamer_gru, cells.gru
    for (cell, plain, without), (T, B, I, H) in itertools.product((lstm, gru), SIZES):
        x = torch.randn(T, B, I)
        rnn, ours = layer(cell, x, H)
        weights = {name.removesuffix("_l0"): a for name, a in rnn.named_parameters()}
        theirs = calls(lambda: plain(x, weights), list(weights.values()))  # noqa: B023 # called in this turn
        title = f"`{cell.name}`, T {T}, B {B}, I {I}, H {H}"
        yield title, {"torch": theirs, "fastlstm": ours, "without": layer(without, x, H)[1]}


def heads() -> Iterator[tuple[str, dict[str, Runs]]]:
    """Yield what each row of layers of heads is called, and what runs."""
    H = HEADS * UNITS
    for B in BATCHES:
        inputs = tuple(torch.randn(STEPS, B, H) for _ in slstm_of_inputs.inputs)
        rnn = fastlstm.RNN(slstm_of_inputs, 0, H, bias=False, heads=HEADS, backend="numba")
        named, leaves = dict(zip(slstm_of_inputs.inputs, inputs)), list(rnn.parameters())
        ours = calls(lambda: rnn(None, inputs=named)[0], leaves)  # noqa: B023 # called in this turn
        theirs = calls(lambda: plain_heads(inputs, rnn.weight_hh_l0), leaves)  # noqa: B023
        yield f"sLSTM, {HEADS} heads of {UNITS}, T {STEPS}, B {B}", {"torch": theirs, "fastlstm": ours}


def norms_of_heads() -> Iterator[tuple[str, dict[str, Runs]]]:
    """Yield the row of an LSTM whose heads have norms."""
    x = torch.randn(STEPS, 16, UNITS)
    rnn, ours = layer(normed_lstm("head"), x, HEADS * UNITS, HEADS)
    weights = {name.removesuffix("_l0"): a for name, a in rnn.named_parameters()}
    theirs = calls(lambda: plain_normed_lstm(x, weights), list(weights.values()))
    without = layer(normed_lstm("row"), x, HEADS * UNITS, HEADS)[1]
    title = f"LSTM, {HEADS} heads of {UNITS}, each with a norm, T {STEPS}, B 16, I {UNITS}"
    yield title, {"torch": theirs, "fastlstm": ours, "without": without}


KINDS = {"norms": norms, "heads": heads, "norms_of_heads": norms_of_heads}


def rows(options: Options) -> Iterator[list[str]]:
    for title, runs in (row for kind in options.only for row in KINDS[kind]()):
        check(runs["fastlstm"]["training"](), runs["torch"]["training"](), TOLERANCE)
        for mode in MODES:
            sides = compare({name: of[mode] for name, of in runs.items()}, options.rounds, options.threads)
            plain, ours, *without = sides.values()
            cost = [f"{side.to(ours).median:.2f}" for side in without] or [""]
            yield [title, mode, plain.ms, ours.ms, str(ours.to(plain)), *cost]


if __name__ == "__main__":
    arguments = parser("cpu.norms_and_heads", __doc__, rounds=15)
    arguments.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    header = ["layer", "call", "plain PyTorch", "fastlstm", "ratio", "beside the cell without norms"]
    print_table(header, rows(arguments.parse_args()))
