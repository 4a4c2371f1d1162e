"""Layers of the Triton backend on emulated code, compared with the reference in float64."""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends import triton as backend
from fastlstm.backends.base import Gradients, Layer, Run, held_steps
from tests.ptx import Device, emulated

PRECISIONS = {"bf16": "native", "fp16": "native", "tf32": "tf32", "ieee": "ieee"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
ALL = Gradients.of(cells.lstm, [True] * 7)
MASKS = ("lengths", "reset", "lengths+reset")
# Of outputs, absolute, where results are about one; of gradients, of the largest of each.
# bf16: 2^-9 = 2e-3 each for the input's product (|.| < 4, times a slope of 1/4), the gates, h and the product's h. Four
# of them, and what five steps carry on, make 2e-2. fp16: 2^-11 = 5e-4, and tanh.approx as much; tf32 the same.
# ieee: float32's 6e-8 and 2 ulp of exp and of the division, over sums of 200 terms of 0.1.
# Gradients are products of three or four such numbers, and sums over all steps: twice as much, in ieee five times.
BOUNDS = {"bf16": (2e-2, 4e-2), "fp16": (3e-3, 6e-3), "tf32": (3e-3, 6e-3), "ieee": (2e-6, 1e-5)}


@dataclass(frozen=True)
class Case:
    """One layer.

    Attributes:
        rows: of each layer of a stack of G. 0 G is one layer.
        turned: batch first in memory.
        grads: "all", "ends" for those of the last states alone, or "cells" for those of every cell state as well.
        quiet: the forward pass runs once more without saving.
        multiprocessors: of the chip. Of few, programs take 16 rows.
    """

    chip: int
    kind: str
    H: int
    mask: str = ""
    T: int = 2
    rows: int = 11
    G: int = 0
    I: int = 40
    reverse: bool = False
    bias: bool = True
    turned: bool = False
    grads: str = "all"
    quiet: bool = False
    multiprocessors: int = 132

    def __str__(self) -> str:
        flags = [name for name in ("reverse", "turned", "quiet") if getattr(self, name)] + ["nobias"] * (not self.bias)
        shape = f"T{self.T}-B{self.rows}" + f"x{self.G}" * bool(self.G) + f"-I{self.I}"
        return "-".join(
            [f"sm_{self.chip}", self.kind, f"H{self.H}", shape, self.grads, *[self.mask] * bool(self.mask), *flags]
        )


def matrix() -> Iterator[Case]:
    """Two chips and each precision at three sizes, which take other tiles. The rest changes from layer to layer, so
    that all values meet. Then chips of little shared memory, and programs of 16 rows.
    """
    for number, (chip, kind, H) in enumerate(itertools.product((80, 90), DTYPES, (33, 128, 130))):
        yield Case(
            chip, kind, H, ("", *MASKS)[number % 4],
            T=min((5, 2, 5, 1, 2)[number % 5], 5 if H <= 128 else 2), rows=(3, 8, 11)[number // 2 % 3],
            G=(0, 0, 2)[number % 3 - 1], I=(28, 40, 5, 16)[(number + number // 8) % 4],
            reverse=number % 7 in (1, 3, 4), bias=number % 5 != 3, turned=number // 3 % 2 == 1,
            grads=("all", "cells", "ends")[(number // 2 + number // 8) % 3], quiet=number % 3 == 0,
        )  # fmt: skip
    for chip, kind in ((86, "bf16"), (86, "tf32"), (120, "fp16"), (120, "tf32")):
        yield Case(chip, kind, 100, "lengths+reset", I=28, grads="cells")
    for chip, kind, H, mask in ((80, "bf16", 128, ""), (90, "fp16", 128, ""), (90, "tf32", 64, "lengths")):
        yield Case(chip, kind, H, mask, I=28, rows=19, multiprocessors=1)


@dataclass
class Result:
    """The largest errors of the outputs and of the gradients, relative as `BOUNDS`; what was found."""

    errors: dict[str, float]
    device: Device

    @property
    def outputs(self) -> float:
        return max((e for name, e in self.errors.items() if not name.startswith("d")), default=0.0)

    @property
    def gradients(self) -> float:
        return max((e for name, e in self.errors.items() if name.startswith("d")), default=0.0)

    def faults(self, kind: str) -> set[str]:
        """The kinds of findings, and "numbers" where a bound is passed."""
        outputs, gradients = BOUNDS[kind]
        right = self.outputs < outputs and self.gradients < gradients
        return self.device.findings.kinds | ({"numbers"} if not right else set())


def drawn(case: Case) -> tuple[Layer, Run]:
    """The layer, and gradients for what comes out of it. Its padding is NaN."""
    seed = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    T, B, H, I = case.T, case.rows * max(case.G, 1), case.H, case.I
    stack = (case.G,) if case.G else ()

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=seed, dtype=torch.double) * scale).to(DTYPES[case.kind])

    def steps(n: int) -> Tensor:
        a = draw(T, B, n)
        return a.transpose(0, 1).contiguous().transpose(0, 1) if case.turned else a

    lengths = torch.randint(0, T + 1, (B,), generator=seed) if "lengths" in case.mask else None
    reset = torch.rand(T, B, generator=seed) < 0.3 if "reset" in case.mask else None
    weights = draw(*stack, 4 * H, I, scale=I**-0.5), draw(*stack, 4 * H, H, scale=H**-0.5)
    bias = draw(*stack, 4 * H, scale=0.5) if case.bias else None
    states = draw(B, H, scale=0.5).clamp(-1, 1), draw(B, H)
    layer = Layer(steps(I), (*weights, bias, None), states, lengths, reset, case.reverse, cells.lstm)
    if (held := held_steps(layer)) is not None:
        layer.x.masked_fill_(held, float("nan"))
    everything = case.grads != "ends"
    last = draw(B, H), draw(B, H) if everything else None
    return layer, Run(steps(H) if everything else None, last, (steps(H) if case.grads == "cells" else None,))


def run(case: Case, direction: str = "both", **options: Any) -> Result:
    """Run a layer on emulated code. direction: "forward", or "backward" alone, or "both". options: of `emulated`."""
    layer, grads = drawn(case)
    precision = PRECISIONS[case.kind]
    exact = layer.to(torch.double)
    given = [a for a in (*layer.tensors, grads.h, *grads.last, *grads.saved) if a is not None]
    before = [a.clone() for a in given]
    results = forward_results(case) if direction == "backward" else None
    with emulated(case.chip, multiprocessors=case.multiprocessors, **options) as device:
        if results is None:
            results = backend.forward(layer, True, precision)
        quiet = backend.forward(layer, False, precision) if case.quiet and direction == "both" else None
        back = backend.backward(grads, layer, results, ALL, precision) if direction != "forward" else None
    for a, old in zip(given, before):
        if not torch.equal(a.nan_to_num(7), old.nan_to_num(7)):
            device.findings.report("input changed", None, str(tuple(a.shape)))
    want, errors = reference.forward(exact, True), {}
    if direction != "backward":
        named = {"h": (results.h, want.h), "c": (results.saved[0], want.saved[0])}
        named |= {"h_n": (results.last[0], want.last[0]), "c_n": (results.last[1], want.last[1])}
        if quiet is not None:
            named |= {"quiet h": (quiet.h, want.h), "quiet c_n": (quiet.last[1], want.last[1])}
        errors |= {name: largest(got, truth, 1.0) for name, (got, truth) in named.items()}
    if back is not None:
        doubled = Run(*(map_double(part) for part in grads))
        truth = reference.backward(doubled, exact, want, ALL)
        names = ("dx", "dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dh_0", "dc_0")
        for name, got, one in zip(names, back.flat, truth.flat, strict=True):
            if one is not None:
                errors[name] = largest(got, one, float(one.abs().max()))
    return Result(errors, device)


@cache
def forward_results(case: Case) -> Run:
    """What the unchanged forward pass leaves for backward."""
    with emulated(case.chip, multiprocessors=case.multiprocessors):
        return backend.forward(drawn(case)[0], True, PRECISIONS[case.kind])


def map_double(part: Tensor | tuple | None) -> Tensor | tuple | None:
    if isinstance(part, tuple):
        return tuple(map(map_double, part))
    return None if part is None else part.double()


def largest(got: Tensor, want: Tensor, size: float) -> float:
    """The largest error, relative to `size` or the value, whichever is larger. NaN counts as infinitely wrong."""
    if not got.numel() or not size:
        return float(got.double().abs().max()) if got.numel() else 0.0
    worst = float(((got.double() - want).abs() / want.abs().clamp(min=size)).max())
    return worst if worst == worst else float("inf")
