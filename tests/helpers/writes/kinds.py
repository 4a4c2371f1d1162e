"""The modules that are written to, and how they are called."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastlstm
from tests.helpers.layers import needs_native
from tests.helpers.numba import needs_pieces


class Setting(NamedTuple):
    backend: str
    dtype: torch.dtype
    cast: bool = False  # calls are made under an autocast to bfloat16


class Kind(NamedTuple):
    """A module, and how it is called."""

    T: int
    B: int
    I: int = 5
    H: int = 7
    how: str = "forward"
    of: str = "LSTM"
    options: dict[str, Any] = {}  # noqa: RUF012  nobody writes to it

    def module(self, setting):
        kind = getattr(fastlstm, f"{self.of}Cell" if self.how == "cell" else self.of)
        return kind(self.I, self.H, dtype=setting.dtype, backend=setting.backend, **self.options)

    def arguments(self, dtype, zeros=False):
        x = torch.randn(*(() if self.how != "forward" else (self.T,)), self.B, self.I).to(dtype)
        copies = self.options.get("num_layers", 1) * (1 + self.options.get("bidirectional", False))
        size = (self.B, self.H) if self.how == "cell" else (copies, self.B, self.H)
        states = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        return x, None if zeros else states if self.of == "LSTM" else states[0]

    def call(self, module, arguments, setting, mode=torch.no_grad):
        with mode(), torch.autocast("cpu", torch.bfloat16) if setting.cast else nullcontext():
            result = (module.step if self.how == "step" else module)(*arguments)
        return [a.detach() for a in torch.utils._pytree.tree_leaves(result)]

    def fresh(self, module, setting):
        """A new module with clones of the weights that `module` has now."""
        new = self.module(setting)
        for name in names_of(new):
            setattr(new, name, nn.Parameter(getattr(module, name).detach().clone()))
        return new


KINDS = {
    "T1-B1": Kind(1, 1),
    "T4-B2": Kind(4, 2),
    "T28-B1": Kind(28, 1),
    "T28-B128": Kind(28, 128),
    "two-layers-both-directions": Kind(4, 2, options={"num_layers": 2, "bidirectional": True}),
    "step": Kind(1, 2, how="step"),
    "cell": Kind(1, 2, how="cell"),
    "T4-B2-H100": Kind(4, 2, 20, 100),
    "GRU": Kind(4, 2, of="GRU"),
    "GRU-cell": Kind(1, 2, how="cell", of="GRU"),
}
LARGE = {  # more than a megabyte of weights
    "T1-B1": Kind(1, 1, 60, 272),
    "T4-B2": Kind(4, 2, 60, 260),
    "step": Kind(1, 1, 60, 272, how="step"),
    "cell": Kind(1, 2, 60, 260, how="cell"),
}
SETTINGS = [
    *(
        pytest.param(Setting(backend, getattr(torch, dtype)), id=f"{backend}-{dtype}", marks=marks)
        for backend, marks in (("numba", ()), ("native", needs_native))
        for dtype in ("float32", "float64", "bfloat16", "float16")
    ),
    pytest.param(Setting("numba", torch.float32, cast=True), id="numba-autocast"),
    pytest.param(Setting("native", torch.float32, cast=True), id="native-autocast", marks=needs_native),
    pytest.param(Setting("numba-bf16x3", torch.float32), id="numba-bf16x3", marks=needs_pieces),
]
each_setting = pytest.mark.parametrize("setting", SETTINGS)


def names_of(module):
    """The names of the weights, in the order of torch.nn.LSTM: weight_ih, weight_hh, bias_ih, bias_hh of each layer."""
    return [name for name, _ in module.named_parameters()]


def same(got, want):
    """Whether these are the same numbers, where a NaN is the same as another."""
    return all(
        a.dtype is b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(got, want, strict=True)
    )
