"""What transforms, masks and compilers cost: beside torch's layer, or beside the same call without them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils._pytree import tree_map

import fastlstm
from benchmarks.shared.calls import called, inference, training
from benchmarks.shared.case import OURS, Case, Runs
from benchmarks.shared.contest import twins
from benchmarks.shared.shapes import MODES, Shape
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
    directions = [direction_of(p) for p in weights]

    def run() -> Any:
        gradients = torch.autograd.grad(module(x)[0].pow(2).sum(), weights, create_graph=True)
        return torch.autograd.grad(gradients, weights, directions)

    return run


def by_input(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A derivative of the output along a direction of the input, in forward mode."""
    return forward_mode(lambda x: module(x)[0], x)


def by_weights(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """A derivative of the output along a direction of the weights, in forward mode."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return forward_mode(lambda p: functional_call(module, p, (x,))[0], weights)


def forward_mode(function: Callable[[Any], Tensor], at: Any) -> Callable[[], Any]:
    """Return the derivative of a function, without oneDNN, whose LSTM has no forward mode. It is none of fastlstm's."""
    direction = tree_map(direction_of, at)

    def run() -> Any:
        with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
            return jvp(function, (at,), (direction,))

    return run


def direction_of(a: Tensor) -> Tensor:
    return torch.linspace(-1, 1, a.numel()).reshape(a.shape)


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
    T, B, lstm, x = shape.T, shape.B, shape.module(fastlstm), torch.randn(shape.T, shape.B, shape.I)
    masks = {name: torch.rand(T, B) < 0.05 if name == "reset" else torch.randint(T // 2, T + 1, (B,))}
    return beside(mode, lambda: lstm(x, **masks)[0], lambda: lstm(x)[0], lstm)


def beside(mode: str, ours: Callable[[], Tensor], without: Callable[[], Tensor], module: nn.Module) -> Runs:
    return {name: called(mode, call, module.parameters()) for name, call in ((OURS, ours), (WITHOUT, without))}


def compiled(shape: Shape, mode: str) -> Runs:
    lstm, x = shape.module(fastlstm), torch.randn(shape.T, shape.B, shape.I)
    module = torch.compile(lstm)
    return beside(mode, lambda: module(x)[0], lambda: lstm(x)[0], lstm)


def compiled_classifier(mode: str) -> Runs:
    model, images, labels = RowLSTM(), torch.randn(128, 28, 28), torch.randint(0, 10, (128,))

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    compiled_loss = torch.compile(loss)
    return beside(mode, lambda: compiled_loss(images, labels), lambda: loss(images, labels), model)


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


def case(name: str, build: Callable[[str], Runs], *modes: str, **more: Any) -> Case:
    return Case("transforms", name, build, modes or MODES, **more)


STEP = Shape(1, 1, 64, 64)
CASES = [
    *(
        case(f"{name}, {shape}", partial(masked, name, shape), unlike=(OURS,))
        for shape in SIZES
        for name in ("reset", "lengths")
    ),
    *(case(f"torch.compile, {shape}", partial(compiled, shape), "training") for shape in SIZES),
    case("torch.compile, a classifier with its loss", compiled_classifier, "training"),
    *(
        case(f"{what}, {shape}", partial(derived, what, shape), "training", tolerance=1e-3)
        for shape in DERIVED
        for what in DERIVATIVES
    ),
    *(case(f"{M} models, {shape}", partial(many, M, shape), tolerance=1e-3) for M, shape in MODELS),
    *(case(f"patch_operators, {shape}", partial(operators, shape, False), "training") for shape in OPERATORS),
    case(f"patch_operators, {STEP}", partial(operators, STEP, False), "inference"),
    case(f"patch_operators, a scripted module, {STEP}", partial(operators, STEP, True), "inference"),
]
