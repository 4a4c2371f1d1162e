"""What transforms, masks and compilers cost: beside torch's layer, or beside the same call without them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import fastlstm
from benchmarks.shared.calls import called, inference, training
from benchmarks.shared.case import OURS, Case, Runs
from benchmarks.shared.contest import twins
from benchmarks.shared.shapes import Shape
from fastlstm.mnist.model import RowLSTM

SIZES = Shape(28, 128, 28, 128), Shape(128, 64, 256, 256)  # resets, lengths, compilation
DERIVED = Shape(28, 128, 28, 128), Shape(28, 16, 28, 128), Shape(100, 16, 64, 64)
MODELS = ((8, Shape(28, 16, 28, 128)), (16, Shape(50, 16, 8, 32)))
OPERATORS = (Shape(28, 128, 28, 128), Shape(28, 128, 28, 128, cell="GRU"), Shape(50, 16, 28, 64, 2, True, "GRU"))
WITHOUT = "without"


def penalty(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A critic's gradient penalty and its gradients."""
    x, weights = x.clone().requires_grad_(), list(module.parameters())

    def run() -> Any:
        (gradient,) = torch.autograd.grad(module(x)[0][-1].sum(), x, create_graph=True)
        return torch.autograd.grad((gradient.norm(dim=-1) - 1).pow(2).mean(), weights, allow_unused=True)

    return run


def hessian_vector(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    weights = list(module.parameters())
    directions = [torch.linspace(-1, 1, p.numel()).reshape(p.shape) for p in weights]

    def run() -> Any:
        gradients = torch.autograd.grad(module(x)[0].pow(2).sum(), weights, create_graph=True)
        return torch.autograd.grad(gradients, weights, directions)

    return run


def by_input(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A derivative of the output along a direction of the input, in forward mode."""
    direction = torch.linspace(-1, 1, x.numel()).reshape(x.shape)

    def run() -> Any:
        with no_onednn():
            return jvp(lambda x: module(x)[0], (x,), (direction,))

    return run


def by_weights(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A derivative of the output along a direction of the weights, in forward mode."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    directions = {name: torch.linspace(-1, 1, p.numel()).reshape(p.shape) for name, p in weights.items()}

    def run() -> Any:
        with no_onednn():
            return jvp(lambda p: functional_call(module, p, (x,))[0], (weights,), (directions,))

    return run


def no_onednn() -> AbstractContextManager[object]:
    """Return a context without oneDNN, whose LSTM has no forward mode. It is none of fastlstm's."""
    return torch.backends.mkldnn.flags(enabled=False)  # type: ignore[no-untyped-call]


DERIVATIVES: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]] = {
    "gradient penalty": penalty,
    "Hessian-vector product": hessian_vector,
    "jvp by x": by_input,
    "jvp by weights": by_weights,
}


def derived(what: str, shape: Shape, mode: str) -> Runs:
    (theirs, ours), x = twins(shape), torch.randn(shape.T, shape.B, shape.I)
    return {OURS: DERIVATIVES[what](ours, x), "torch": DERIVATIVES[what](theirs, x)}


def masked(name: str, shape: Shape, mode: str) -> Runs:
    """Return a layer with resets or lengths beside the layer without, which computes something else."""
    T, B, lstm, x = shape.T, shape.B, fastlstm.LSTM(shape.I, shape.H), torch.randn(shape.T, shape.B, shape.I)
    masks = {name: torch.rand(T, B) < 0.05 if name == "reset" else torch.randint(T // 2, T + 1, (B,))}
    calls = {OURS: lambda: lstm(x, **masks)[0], WITHOUT: lambda: lstm(x)[0]}
    return {name: called(mode, call, lstm.parameters()) for name, call in calls.items()}


def compiled(shape: Shape, mode: str) -> Runs:
    lstm, x = fastlstm.LSTM(shape.I, shape.H), torch.randn(shape.T, shape.B, shape.I)
    ways = {OURS: torch.compile(lstm), WITHOUT: lstm}
    return {name: called(mode, lambda m=module: m(x)[0], lstm.parameters()) for name, module in ways.items()}


def compiled_classifier(mode: str) -> Runs:
    model, images, labels = RowLSTM(), torch.randn(128, 28, 28), torch.randint(0, 10, (128,))

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    ways = {OURS: torch.compile(loss), WITHOUT: loss}
    return {name: training(lambda f=f: f(images, labels), model.parameters()) for name, f in ways.items()}


def many(M: int, shape: Shape, mode: str) -> Runs:
    """Return M models in one call, by `Ensemble` and by vmap, beside loops over torch's layers and over ours."""
    theirs, ours = zip(*(twins(shape) for _ in range(M)))
    stacked, ensemble = stack_module_state(list(ours))[0], fastlstm.Ensemble(list(ours))
    x = torch.randn(shape.T, shape.B, shape.I)
    output = vmap(lambda p: functional_call(ours[0], p, (x,))[0])
    gradient = vmap(grad(lambda p: functional_call(ours[0], p, (x,))[0].sum()))
    loops = {"torch": theirs, "a loop of ours": ours}
    if mode == "inference":
        runs: Runs = {OURS: inference(lambda: ensemble(x)[0]), "vmap": inference(lambda: output(stacked))}
        looped = {name: inference(lambda m=m: torch.stack([each(x)[0] for each in m])) for name, m in loops.items()}
        return runs | looped
    step = training(lambda: ensemble(x)[0].sum(), ensemble.parameters())
    runs = {OURS: lambda: step()[1:], "vmap": lambda: list(gradient(stacked).values())}
    for name, models in loops.items():
        steps = [training(lambda m=m: m(x)[0].sum(), m.parameters()) for m in models]
        runs[name] = lambda steps=steps: [torch.stack(of) for of in zip(*(step()[1:] for step in steps))]
    return runs


def operators(shape: Shape, is_scripted: bool, mode: str) -> Runs:
    """Return torch's module under `patch_operators`, beside it without and beside `replace`."""
    (theirs, ours), x = twins(shape), torch.randn(shape.T, shape.B, shape.I)
    module = torch.jit.script(nn.Sequential(theirs)) if is_scripted else theirs
    call = called(mode, lambda: module(x)[0], module.parameters())

    def patched() -> Any:
        return call()

    patched.within = fastlstm.patch_operators  # type: ignore[attr-defined]  # which the clock enters
    runs: Runs = {OURS: patched, "torch": call}
    return runs if is_scripted else runs | {"ours by replace": called(mode, lambda: ours(x)[0], ours.parameters())}


CASES = [
    *(
        Case("transforms", f"{name}, {shape}", partial(masked, name, shape), unlike=(OURS,))
        for shape in SIZES
        for name in ("reset", "lengths")
    ),
    *(Case("transforms", f"torch.compile, {shape}", partial(compiled, shape), ("training",)) for shape in SIZES),
    Case("transforms", "torch.compile, a classifier with its loss", compiled_classifier, ("training",)),
    *(
        Case("transforms", f"{what}, {shape}", partial(derived, what, shape), ("training",), tolerance=1e-3)
        for shape in DERIVED
        for what in DERIVATIVES
    ),
    *(Case("transforms", f"{M} models, {shape}", partial(many, M, shape), tolerance=1e-3) for M, shape in MODELS),
    *(
        Case("transforms", f"patch_operators, {shape}", partial(operators, shape, False), ("training",))
        for shape in OPERATORS
    ),
    *(
        Case("transforms", f"patch_operators, {'a scripted module, ' * is_scripted}{Shape(1, 1, 64, 64)}",
             partial(operators, Shape(1, 1, 64, 64), is_scripted), ("inference",))
        for is_scripted in (False, True)
    ),
]  # fmt: skip
