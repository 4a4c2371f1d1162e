"""Recurrent layers of other packages, and the same networks with fastlstm.

python -m benchmarks.cpu.packages [--only keras ncps torchrecurrent snntorch] [--rounds 15]

The layers are what their packages build by default, but for the sizes, and Keras's GRU has ``reset_after=False``. The
network of snnTorch is that of its tutorial 5: two linear layers, each with leaky neurons, for 25 steps. Its input
changes with each step here. Before the clock starts the outputs and all gradients are compared in float64. All run on
one thread and on all in every round, and the faster counts. ``pip install keras ncps torchrecurrent snntorch`` installs
the packages.
"""

import os
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.shared.calls import called, check, training
from benchmarks.shared.clock import compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm import cells
from fastlstm.cells import sigmoid, tanh

T, B, I, H = 50, 32, 28, 128
TOLERANCE = 1e-5  # in float64, though Keras's products and snnTorch's spikes are float32 even then
PARTS = "f_1", "f_2", "time_a", "time_b"
Calls = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # the package's and ours
Read = Callable[[Tensor], Tensor]  # what is read of a parameter of the package: itself, or its gradient
Ours = tuple[Calls, list[Tensor], dict[str, Tensor], Callable[[Read], dict[str, Tensor]]]


@cells.cell(gates={"v": "xh"}, states=("h",), products=PARTS, params=[f"bias_{name}" for name in PARTS])
def cfc_with_backbone(
    v: Any, f_1: Any, f_2: Any, time_a: Any, time_b: Any, bias_f_1: Any, bias_f_2: Any, bias_time_a: Any,
    bias_time_b: Any,
) -> Any:  # fmt: skip
    """`ncps.torch.CfC` with H units in its backbone, and one unit of time between two steps."""
    v = 1.7159 * tanh(0.666 * v)
    share = sigmoid(time_a(v) + bias_time_a + time_b(v) + bias_time_b)
    return tanh(f_1(v) + bias_f_1) * (1 - share) + share * tanh(f_2(v) + bias_f_2)


def keras() -> Ours:
    """Keras's GRU with the reset gate before the product."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    from keras.layers import GRU

    from fastlstm.integrations import keras as integration

    layer = GRU(
        H, reset_after=False, return_sequences=True, dtype=str(torch.get_default_dtype()).removeprefix("torch.")
    )
    x = torch.randn(B, T, I)
    layer.build(x.shape)
    theirs = [variable.value for variable in layer.trainable_variables]

    def ours() -> Any:
        integration.enable()
        output = layer(x)
        integration.disable()
        return output

    same = {str(k): a for k, a in enumerate(theirs)}
    return (lambda: layer(x), ours), theirs, same, lambda read: {name: read(a) for name, a in same.items()}


def of_layer(cell: cells.Cell, module: nn.Module, call: Read, weights: Callable[[Read], dict[str, Tensor]]) -> Ours:
    """Return a layer of another package and a layer of a cell. `weights` gives its parameters made of the module's."""
    rnn, x = fastlstm.RNN(cell, I, H), torch.randn(T, B, I)
    ours = {name.removesuffix("_l0"): a for name, a in rnn.named_parameters()}
    ours["bias_hh"].data.zero_()
    return (lambda: call(x), lambda: rnn(x)[0]), [a for a in module.parameters() if a.requires_grad], ours, weights


def ncps() -> Ours:
    """Closed-form continuous time with a backbone of one layer."""
    from ncps.torch import CfC

    module = CfC(I, H, batch_first=False, backbone_units=H)
    own = module.rnn_cell
    parts = dict(zip(PARTS, (own.ff1, own.ff2, own.time_a, own.time_b)))

    def weights(read: Read) -> dict[str, Tensor]:
        both, bias = read(own.backbone[0].weight), read(own.backbone[0].bias)
        named = {"weight_ih": both[:, :I], "weight_hh": both[:, I:], "bias_ih": bias}
        for name, linear in parts.items():
            named |= {f"weight_{name}": read(linear.weight), f"bias_{name}": read(linear.bias)}
        return named

    return of_layer(cfc_with_backbone, module, lambda x: module(x)[0], weights)


def torchrecurrent() -> Ours:
    """The multiplicative LSTM."""
    from torchrecurrent import MultiplicativeLSTM

    module, cell = MultiplicativeLSTM(I, H), cells.multiplicative_lstm
    own = module.cells[0]

    def weights(read: Read) -> dict[str, Tensor]:
        named = {name: read(getattr(own, name)) for name in ("weight_ih", "weight_hh", "bias_ih")}
        return named | {f"weight_{name}": a for name, a in zip(cell.products, read(own.weight_mh).chunk(4))}

    return of_layer(cell, module, lambda x: module(x)[0], weights)


def snntorch() -> Ours:
    """The network of tutorial 5: 784 inputs, 1000 and 10 neurons."""
    from snntorch import Leaky

    steps, rows, widths, beta = 25, 128, (784, 1000, 10), 0.95
    linears = [nn.Linear(a, b) for a, b in pairwise(widths)]
    leaky, x = [Leaky(beta=beta) for _ in linears], torch.rand(steps, rows, widths[0])
    copies = [nn.Linear(a, b) for a, b in pairwise(widths)]
    neurons = [fastlstm.RNN(cells.lif, 0, b).requires_grad_(False) for b in widths[1:]]
    for layer in neurons:
        layer.beta_l0.fill_(beta)

    def theirs() -> Tensor:
        membranes, outputs = [layer.reset_mem() for layer in leaky], []
        for spikes in x:
            for k, linear in enumerate(linears):
                spikes, membranes[k] = leaky[k](linear(spikes), membranes[k])
                spikes = spikes.to(x.dtype)
            outputs.append(spikes)
        return torch.stack(outputs)

    def ours() -> Tensor:
        spikes = x
        for linear, layer in zip(copies, neurons):
            spikes = layer(linear(spikes))[0]
        return spikes

    def named(modules: list[nn.Linear]) -> dict[str, Tensor]:
        return dict(nn.ModuleList(modules).named_parameters())

    own = named(linears)
    return (theirs, ours), list(own.values()), named(copies), lambda read: {name: read(a) for name, a in own.items()}


PACKAGES: dict[str, tuple[str, Callable[[], Ours]]] = {
    "keras": (f"GRU with reset_after=False, T {T}, B {B}, I {I}, H {H}", keras),
    "ncps": ("CfC of that size", ncps),
    "torchrecurrent": ("MultiplicativeLSTM of that size", torchrecurrent),
    "snntorch": ("tutorial 5, T 25, B 128, 784-1000-10 neurons", snntorch),
}


def built(build: Callable[[], Ours]) -> Ours:
    """Return both sides with the same weights."""
    torch.manual_seed(0)
    calls, leaves, ours, weights = build()
    for name, value in weights(Tensor.detach).items():
        ours[name].data.copy_(value)
    return calls, leaves, ours, weights


def compare_in_float64(build: Callable[[], Ours]) -> None:
    """Raise unless outputs and gradients are equal up to rounding."""
    torch.set_default_dtype(torch.float64)
    (theirs, ours), leaves, own, weights = built(build)
    expected, *gradients = training(theirs, leaves)()
    found = dict(zip(map(id, leaves), gradients))
    wanted = weights(lambda a: found[id(a)])
    output, *gradients = training(ours, list(own.values()))()
    check(output, expected, TOLERANCE)
    got = dict(zip(own, gradients))
    check([got[name] for name in wanted], list(wanted.values()), TOLERANCE)
    torch.set_default_dtype(torch.float32)


def rows(options: Options) -> Iterator[list[str]]:
    for package in options.only:
        title, build = PACKAGES[package]
        compare_in_float64(build)
        calls, leaves, own, _ = built(build)
        sides = list(zip(("theirs", "ours"), calls, (leaves, list(own.values()))))
        for mode in MODES:
            runs = {name: called(mode, call, of) for name, call, of in sides}
            times = compare(runs, options.rounds, options.threads)
            theirs, ours = times["theirs"], times["ours"]
            version = f"{package} {metadata.version(package)}"
            yield [version, title, mode, theirs.ms, ours.ms, str(ours.to(theirs))]


if __name__ == "__main__":
    arguments = parser("cpu.packages", __doc__, rounds=15)
    arguments.add_argument("--only", nargs="+", choices=PACKAGES, default=list(PACKAGES), metavar="PACKAGE")
    print_table(["package", "network", "call", "before", "with fastlstm", "ratio"], rows(arguments.parse_args()))
