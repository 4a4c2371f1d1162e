"""What transforms, masks and compilation cost: each against torch.nn.LSTM or the plain fastlstm.LSTM.

python -m benchmarks.cpu.transforms [--rounds 31]
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastlstm
from benchmarks.shared.calls import inference, training
from benchmarks.shared.clock import Run, compare
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm.mnist.model import RowLSTM

SIZES = [(28, 128, 28, 128), (128, 64, 256, 256)]  # T, B, I, H: resets, lengths, compilation
MODELS, STACK = 8, (28, 16, 28, 128)


def penalty(module: nn.Module, x: Tensor) -> Run:
    """A critic's gradient penalty and its gradients."""
    x, weights = x.clone().requires_grad_(), list(module.parameters())

    def run() -> object:
        (gradient,) = torch.autograd.grad(module(x)[0][-1].sum(), x, create_graph=True)
        return torch.autograd.grad((gradient.norm(dim=-1) - 1).pow(2).mean(), weights, allow_unused=True)

    return run


def hessian_vector(module: nn.Module, x: Tensor) -> Run:
    weights = list(module.parameters())
    directions = [torch.linspace(-1, 1, p.numel()).reshape(p.shape) for p in weights]

    def run() -> object:
        gradients = torch.autograd.grad(module(x)[0].pow(2).sum(), weights, create_graph=True)
        return torch.autograd.grad(gradients, weights, directions)

    return run


def by_input(module: nn.Module, x: Tensor) -> Run:
    """A derivative of the output along a direction of the input, in forward mode."""
    direction = torch.linspace(-1, 1, x.numel()).reshape(x.shape)

    def run() -> object:
        with no_onednn():
            return jvp(lambda x: module(x)[0], (x,), (direction,))

    return run


def by_weights(module: nn.Module, x: Tensor) -> Run:
    """A derivative of the output along a direction of the weights, in forward mode."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    directions = {name: torch.linspace(-1, 1, p.numel()).reshape(p.shape) for name, p in weights.items()}

    def run() -> object:
        with no_onednn():
            return jvp(lambda p: functional_call(module, p, (x,))[0], (weights,), (directions,))

    return run


def no_onednn() -> AbstractContextManager[object]:
    """Return a context without oneDNN, whose LSTM has no forward mode. It is none of fastlstm's."""
    return torch.backends.mkldnn.flags(enabled=False)  # type: ignore[no-untyped-call]


def check(what: str, first: Any, second: Any) -> None:
    """Both compute the same: a vmap's results are a loop's in another order."""
    leaves = ([a for a in pytree.tree_leaves(result) if a is not None] for result in (first, second))
    a, b = (torch.cat([a.detach().flatten() for a in each]).double() for each in leaves)
    for way in (lambda v: v.abs().sum(), lambda v: v.square().sum()):
        if not torch.isclose(way(a), way(b), rtol=1e-3):
            raise AssertionError(f"{what}: the two differ, {way(a):.6g} and {way(b):.6g}")


Row = tuple[str, str, Run, str, Run]  # what; the first rival; the second, whose speed is given in the first's


def called_by(mode: str, module: nn.Module, x: Tensor, **masks: Tensor) -> Callable[[], Any]:
    """Return a call of a layer, in training with the gradients of its output's sum."""
    if mode == "inference":
        return inference(lambda: module(x, **masks))
    return training(lambda: pytree.tree_leaves(module(x, **masks))[0].sum(), module.parameters())


def twins(I: int, H: int) -> tuple[nn.Module, nn.Module]:
    """Return torch's layer and ours with the same weights."""
    theirs, ours = nn.LSTM(I, H), fastlstm.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def comparisons() -> Iterator[Row]:
    for T, B, I, H in SIZES:
        lstm, size, x = fastlstm.LSTM(I, H), f"T{T}-B{B}-I{I}-H{H}", torch.randn(T, B, I)
        masks = {"reset": torch.rand(T, B) < 0.05, "lengths": torch.randint(T // 2, T + 1, (B,))}
        for (name, mask), mode in itertools.product(masks.items(), MODES):
            runs = called_by(mode, lstm, x), called_by(mode, lstm, x, **{name: mask})
            yield f"{size}, {mode}", "plain", runs[0], name, runs[1]
        runs = called_by("training", lstm, x), called_by("training", torch.compile(lstm), x)
        yield f"{size}, training", "eager", runs[0], "compiled", runs[1]
    model, images, labels = RowLSTM(), torch.randn(128, 28, 28), torch.randint(0, 10, (128,))

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    eager, compiled = (training(lambda f=f: f(images, labels), model.parameters()) for f in (loss, torch.compile(loss)))
    yield "row-LSTM classifier with its loss, training", "eager", eager, "compiled", compiled
    derivatives = {
        "gradient penalty": penalty,
        "Hessian-vector product": hessian_vector,
        "jvp by x": by_input,
        "jvp by weights": by_weights,
    }
    for T, B, I, H in ((28, 128, 28, 128), (28, 16, 28, 128), (100, 16, 64, 64)):
        pair, x = twins(I, H), torch.randn(T, B, I)
        for what, prepare in derivatives.items():
            first, second = (prepare(module, x) for module in pair)
            yield f"{what}, T{T}-B{B}-I{I}-H{H}", "nn.LSTM", first, "ours", second
    yield from ensembles()


def ensembles() -> Iterator[Row]:
    T, B, I, H = STACK
    theirs, ours = zip(*(twins(I, H) for _ in range(MODELS)))
    stacked, _ = stack_module_state(list(ours))
    x, what = torch.randn(T, B, I), f"{MODELS} models, T{T}-B{B}-I{I}-H{H}"
    output = vmap(lambda p: functional_call(ours[0], p, (x,))[0])
    gradient = vmap(grad(lambda p: functional_call(ours[0], p, (x,))[0].sum()))
    for name, models in (("a loop of nn.LSTM", theirs), ("a loop of ours", ours)):
        loop = inference(lambda models=models: [model(x)[0] for model in models])
        yield f"{what}, inference", name, loop, "vmap", inference(lambda: output(stacked))
        trained = [called_by("training", model, x) for model in models]
        loop = lambda trained=trained: [run()[1:] for run in trained]  # noqa: E731
        yield f"{what}, training", name, loop, "vmap", lambda: gradient(stacked)


def rows(options: Options) -> Iterator[list[str]]:
    for what, first, run_first, second, run_second in comparisons():
        if second not in ("reset", "lengths"):  # which compute something else
            check(what, run_first(), run_second())
        sides = compare({first: run_first, second: run_second}, options.rounds, options.threads)
        yield [what, *(f"{name} {side.ms}" for name, side in sides.items()), str(sides[second].to(sides[first]))]


if __name__ == "__main__":
    print_table(["what", "", "", "speed of the second"], rows(parser("cpu.transforms", __doc__).parse_args()))
