"""Random layers beside plain PyTorch in float64: outputs and every gradient, on one to three threads.

python -m tests.arm.random_layers COUNT [--seed SEED]

It prints what is wrong, and each layer with --verbose. The first seed is random unless it is given; each layer has the
next one, by which it can be drawn again.
"""

import argparse
import random
import sys
import traceback

import torch
from torch import Tensor

import fastlstm
from fastlstm import cells
from fastlstm.cells import Cell, cell, sigmoid, tanh

BOUNDS = {torch.float32: 5e-5, torch.float64: 1e-12}
NORM = 10  # times as much for layers with norms, where the mean square of a few units may be small, and is divided by
NATIVE = fastlstm.info()["backends"]["native"] is None


@cell(gates={"g": "xh", "n": "xh"}, states=("h",))
def ugrnn(g: Tensor, n: Tensor, h: Tensor) -> Tensor:
    return tanh(n) + sigmoid(g) * (h - tanh(n))


KINDS: tuple[Cell, ...] = (cells.lstm, cells.gru, cells.elman_tanh, cells.elman_relu, ugrnn, cells.layer_norm_lstm)


def results(module: fastlstm.RNN, x: Tensor, gradient: Tensor, options: dict[str, Tensor]) -> list[Tensor]:
    """Return the output, the last states, and the gradients of x and of every parameter."""
    x = x.detach().clone().requires_grad_(True)
    output, state = module(x, **options)
    values = [output, *(state if isinstance(state, tuple) else (state,))]
    loss = (output * gradient).sum() + sum(value.sum() for value in values[1:])
    return [*values, *torch.autograd.grad(loss, [x, *module.parameters()])]


def wrong(seed: int) -> tuple[str, float]:
    """Return what a layer is, and the largest error of its results as a share of what is allowed."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    kind, dtype, threads = draw.choice(KINDS), draw.choice(list(BOUNDS)), draw.randint(1, 3)
    T, B, I = draw.randint(1, 12), draw.choice((1, 1, 2, 3, 5, 17, 33, 66)), draw.choice((1, 3, 11, 28, 130))
    heads = draw.choice((1, 1, 2, 4)) if kind is ugrnn else 1
    H = heads * draw.choice((1, 4, 7, 20, 45, 70))
    backend = "native" if NATIVE and kind in (cells.lstm, cells.gru) and draw.random() < 0.5 else "numba"
    sizes = {"bidirectional": draw.random() < 0.3, "heads": heads, "dtype": dtype}
    module = fastlstm.RNN(kind, I, H, backend=backend, **sizes)
    exact = fastlstm.RNN(kind, I, H, backend="reference", **{**sizes, "dtype": torch.float64})
    exact.load_state_dict(module.state_dict())
    options = {}
    if draw.random() < 0.3:
        options["lengths"] = torch.randint(0, T + 1, (B,))
    if draw.random() < 0.3 and not sizes["bidirectional"]:
        options["reset"] = torch.rand(T, B) < 0.3
    x, gradient = torch.randn(T, B, I, dtype=dtype), torch.randn(T, B, H * (1 + sizes["bidirectional"]), dtype=dtype)
    torch.set_num_threads(threads)
    got, want = results(module, x, gradient, options), results(exact, x.double(), gradient.double(), options)
    # One element may cancel to nothing: errors are relative to 1 at least.
    errors = [((a.double() - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in zip(got, want)]
    name = f"seed {seed}: {kind.name} T{T} B{B} I{I} H{H} {backend} {dtype} {threads} threads {sizes} {list(options)}"
    allowed = BOUNDS[dtype] * (NORM if kind is cells.layer_norm_lstm else 1)
    return name, max(float("inf") if error != error else error for error in errors) / allowed


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m tests.arm.random_layers", description=__doc__)
    options.add_argument("count", type=int)
    options.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    options.add_argument("--verbose", action="store_true")
    options = options.parse_args()
    failures, worst = 0, 0.0
    for seed in range(options.seed, options.seed + options.count):
        try:
            name, share = wrong(seed)
        except Exception:
            name, share = f"seed {seed}: {traceback.format_exc()}", float("inf")
        failures, worst = failures + (share > 1), max(worst, share)
        if share > 1 or options.verbose:
            print(f"{name}: {share:.2f} of what is allowed", flush=True)
    print(f"{options.count} layers from seed {options.seed}: {failures} wrong, at most {worst:.2f} of what is allowed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
