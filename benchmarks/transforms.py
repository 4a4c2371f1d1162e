"""What transforms, masks, packed input and compilation cost: each against torch.nn.LSTM or the plain fastlstm.LSTM.

python -m benchmarks.transforms [--pairs 31]
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastlstm
from benchmarks.clock import Contender, interleaved, ratio_of
from fastlstm.mnist.model import RowLSTM

Run = Callable[[], object]
SIZES = [(28, 128, 28, 128), (128, 64, 256, 256)]  # T, B, I, H: resets, lengths, compilation
PACKED = [(28, 128, 28, 128), (100, 64, 256, 256)]  # lengths of 1 to T
MODELS, STACK = 8, (28, 16, 28, 128)


def training(module: Callable[..., tuple[Tensor, object]], x: Tensor, weights: list[Tensor], **masks: Tensor) -> Run:
    return lambda: torch.autograd.grad(module(x, **masks)[0].sum(), weights)


def inference(module: Callable[..., tuple[Tensor, object]], x: Tensor | PackedSequence, **masks: Tensor) -> Run:
    return lambda: torch.no_grad()(module)(x, **masks)


def descent(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    weights = list(model.parameters())
    return lambda: torch.autograd.grad(loss(), weights)


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


def values(result: Any) -> Tensor:
    """All numbers of a result."""
    return torch.cat([a.detach().flatten() for a in pytree.tree_leaves(result) if a is not None])


def check(what: str, first: Any, second: Any) -> None:
    """Both compute the same: a vmap's results are a loop's in another order."""
    a, b = (values(result).double() for result in (first, second))
    for way in (lambda v: v.abs().sum(), lambda v: v.square().sum()):
        if not torch.isclose(way(a), way(b), rtol=1e-3):
            raise AssertionError(f"{what}: the two differ, {way(a):.6g} and {way(b):.6g}")


def comparisons() -> list[tuple[str, str, Run, str, Run]]:
    """What, the first rival, and the second, whose speed is given in the first's."""
    rows: list[tuple[str, str, Run, str, Run]] = []
    for T, B, I, H in SIZES:
        lstm, size, x = fastlstm.LSTM(I, H), f"T{T}-B{B}-I{I}-H{H}", torch.randn(T, B, I)
        weights = list(lstm.parameters())
        masks = {"reset": torch.rand(T, B) < 0.05, "lengths": torch.randint(T // 2, T + 1, (B,))}
        for name, mask in masks.items():
            plain, masked = training(lstm, x, weights), training(lstm, x, weights, **{name: mask})
            rows.append((f"{size}, training", "plain", plain, name, masked))
            rows.append((f"{size}, inference", "plain", inference(lstm, x), name, inference(lstm, x, **{name: mask})))
        compiled = training(torch.compile(lstm), x, weights)
        rows.append((f"{size}, training", "eager", training(lstm, x, weights), "compiled", compiled))
    for T, B, I, H in PACKED:
        theirs, ours = nn.LSTM(I, H), fastlstm.LSTM(I, H)
        ours.load_state_dict(theirs.state_dict())
        lengths = torch.linspace(T, 1, B).long()
        x, size = pack_padded_sequence(torch.randn(T, B, I), lengths), f"packed, T{T}-B{B}-I{I}-H{H}"
        runs = [inference(m, x) for m in (theirs, ours)]
        rows.append((f"{size}, inference", "nn.LSTM", runs[0], "ours", runs[1]))
        runs = [descent(m, lambda m=m, x=x: m(x)[0].data.sum()) for m in (theirs, ours)]
        rows.append((f"{size}, training", "nn.LSTM", runs[0], "ours", runs[1]))
    model, images, labels = RowLSTM(), torch.randn(128, 28, 28), torch.randint(0, 10, (128,))
    eager = descent(model, lambda: nn.functional.cross_entropy(model(images), labels))
    loss = torch.compile(lambda images, labels: nn.functional.cross_entropy(model(images), labels))
    compiled = descent(model, lambda: loss(images, labels))
    rows.append(("row-LSTM classifier with its loss, training", "eager", eager, "compiled", compiled))
    for B in (128, 16):
        theirs, ours = nn.LSTM(28, 128), fastlstm.LSTM(28, 128)
        ours.load_state_dict(theirs.state_dict())
        for what, make in (("gradient penalty", penalty), ("Hessian-vector product", hessian_vector)):
            x = torch.randn(28, B, 28)
            rows.append((f"{what}, T28-B{B}-I28-H128", "nn.LSTM", make(theirs, x), "ours", make(ours, x)))
    return rows + ensembles()


def ensembles() -> list[tuple[str, str, Run, str, Run]]:
    T, B, I, H = STACK
    theirs, ours = ([module(I, H) for _ in range(MODELS)] for module in (nn.LSTM, fastlstm.LSTM))
    for a, b in zip(theirs, ours, strict=True):
        b.load_state_dict(a.state_dict())
    stacked, _ = stack_module_state(ours)
    x, what = torch.randn(T, B, I), f"{MODELS} models, T{T}-B{B}-I{I}-H{H}"
    output = vmap(lambda p: functional_call(ours[0], p, (x,))[0])
    gradient = vmap(grad(lambda p: functional_call(ours[0], p, (x,))[0].sum()))
    rows = []
    for name, models in (("a loop of nn.LSTM", theirs), ("a loop of ours", ours)):
        infer = [inference(model, x) for model in models]
        train = [training(model, x, list(model.parameters())) for model in models]
        together: Run = lambda: torch.no_grad()(output)(stacked)  # noqa: E731
        rows.append((f"{what}, inference", name, lambda runs=infer: [run()[0] for run in runs], "vmap", together))
        rows.append(
            (f"{what}, training", name, lambda runs=train: [run() for run in runs], "vmap", lambda: gradient(stacked))
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=31)
    options, threads = parser.parse_args(), torch.get_num_threads()
    print("| what | | | speed of the second |\n|---|---|---|---|")
    for what, first, run_first, second, run_second in comparisons():
        if second not in ("reset", "lengths"):  # which compute something else
            check(what, run_first(), run_second())
        rivals = {first: Contender(run_first, threads), second: Contender(run_second, threads)}
        times = interleaved(rivals, options.pairs)
        ratio = ratio_of(times[first], times[second])
        ms = [f"{name} {statistics.median(times[name]) * 1e3:.2f} ms" for name in (first, second)]
        print(f"| {what} | {' | '.join(ms)} | **{ratio.median:.2f}** ({ratio.low:.2f}–{ratio.high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
