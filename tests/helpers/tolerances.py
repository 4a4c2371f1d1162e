"""How near a result must come to what it should be: fixed numbers by dtype, each with its reason."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


class Kind(NamedTuple):
    """The largest error in each dtype that a result may be computed in, and what it is relative to."""

    of: str  # "one", "largest": the largest value of the tensor, "either": their larger, or "each": one and each value
    bounds: dict[torch.dtype, float]


KINDS = {
    # Values within 1: a few roundings of each, which are 6e-8 and 1e-16.
    "values": Kind("one", {F64: 1e-13, F32: 1e-6}),
    # Sums of at most a few hundred terms, each below 10: 1e-14 apart at worst in float64, and 5e-6 in float32, where
    # products may have 22 bits, as triton-ieee's.
    "sums": Kind("one", {F64: 1e-12, F32: 1e-5}),
    # Sums of such sums, over steps and rows.
    "gradients": Kind("one", {F64: 1e-11, F32: 1e-4}),
    # Values within 1 computed from numbers of 16 bits, which have 8 and 11 bits, at each of several steps.
    "cast": Kind("one", {BF16: 5e-2, F16: 5e-3}),
    # One layer's outputs and gradients. A sum of K terms in order errs by about sqrt(K) eps / 2 of its size, K up to
    # 1300 here, and a step adds to it: a hundred roundings.
    "layer": Kind("largest", {F64: 100 * 2.3e-16, F32: 100 * 1.2e-7}),
    # The same of states that norms scale to up to the square root of the number of units, or that a step makes as the
    # difference of two numbers near 1, which with one unit and one row may be all that there is to compare with.
    "normalized": Kind("either", {F64: 100 * 2.3e-16, F32: 100 * 1.2e-7}),
    # Gradients that are sums of up to a few thousand terms; in 16 bits each of these may round elsewhere.
    "long": Kind("largest", {F64: 1e-12, F32: 1e-5, BF16: 3e-2, F16: 3e-2}),
    # Derivatives under transforms. In float64 a few thousand roundings. In float32 those of products of 22 bits and of
    # several sums of both signs, one for each derivative, in tensors of a few dozen values, whose largest may be less
    # than their terms.
    "derivatives": Kind("largest", {F64: 1e-11, F32: 3e-5}),
    # Models of many layers and what an optimiser makes of their gradients: roundings that each layer adds to.
    "models": Kind("each", {F64: 1e-10, F32: 1e-4}),
    # Models whose gradients are sums of terms that cancel, each as large as the largest value of the tensor: the first
    # convolution of SAR has gradients of 1e-2 to 1e3, which a change of its LSTMs by one rounding moves by 6e-12.
    "models that cancel": Kind("either", {F64: 1e-10, F32: 1e-4}),
}


def close(actual: Any, expected: Any, kind: str, *, where: str = "") -> None:
    """Every tensor of `actual`, in the dtype it was computed in, as near that of `expected` as its kind must be.

    What is expected has the same dtype or is the truth, in float64. NaN is near nothing.
    """
    if actual is None or expected is None:
        assert actual is expected, where
        return
    if not isinstance(actual, Tensor):
        for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
            close(a, b, kind, where=f"{where}[{n}]")
        return
    assert expected.dtype in (actual.dtype, F64), f"{where}: expected {expected.dtype}, got {actual.dtype}"
    of, bounds = KINDS[kind]
    bound, want = bounds[actual.dtype], expected.detach().double()
    largest = want.abs().max().item() if want.numel() else 0.0
    atol = bound * {"one": 1.0, "each": 1.0, "largest": largest, "either": max(1.0, largest)}[of]
    torch.testing.assert_close(
        actual.detach().double(), want, rtol=bound if of == "each" else 0, atol=atol,
        msg=lambda text: f"{where or 'the tensor'}, of the kind {kind!r}: {text}",
    )  # fmt: skip


def equal(actual: Any, expected: Any) -> None:
    """Every tensor of `actual` has the values of that of `expected`, and its dtype. NaN equals nothing."""
    torch.testing.assert_close(list(actual), list(expected), rtol=0, atol=0)
