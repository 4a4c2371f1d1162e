"""Each function that a cell may call is torch's at NaN, infinities and its ends, in all kernels and on tensors."""

import inspect
import math

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.cells.functions import FUNCTIONS
from tests.cells.functions import OF_TORCH
from tests.helpers.transforms import backends

BEFORE, AFTER = math.nextafter(3.0, 0.0), 3.0 + 2**-21  # neighbours of a limit, the second in float32 too
VALUES = [math.nan, math.inf, -math.inf, 0.0, 0.5, -0.5, 3.0, -3.0, BEFORE, -BEFORE, AFTER, -AFTER, 90.0, -90.0, 800.0]


def cell_of(names):
    """A cell that applies each of these functions to an input of its own, and has a state for each result."""
    inputs = [f"x_{name}" for name in names]

    def functions(**values):
        return values["u"] * values[inputs[0]], *(OF_TORCH[name][0](values[f"x_{name}"]) for name in names)

    arguments = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("u", *inputs)]
    functions.__signature__ = inspect.Signature(arguments)
    states = ["h", *(f"of_{name}" for name in names)]
    return cells.cell(gates={}, states=states, params=("u",), inputs=inputs)(functions)


NAMES = [*OF_TORCH]
GROUPS = [NAMES[k::3] for k in range(3)]  # since an operator of torch takes 64 arguments


def test_every_function_is_tried():
    of_units = {"mean", "layer_norm", "rms_norm"}
    assert {*FUNCTIONS} - of_units - {"surrogate"} <= {*OF_TORCH}  # torch has no surrogate gradients


@backends
@pytest.mark.parametrize("names", GROUPS, ids=" ".join)
def test_special_values(backend, names):
    dtype = torch.float32 if backend.startswith("triton") else torch.float64
    rnn = fastlstm.RNN(cell_of(names), 0, len(VALUES), dtype=dtype, backend=backend)
    operands = [torch.tensor(VALUES, dtype=dtype, requires_grad=True) for _ in names]
    inputs = {f"x_{name}": x.view(1, 1, -1) for name, x in zip(names, operands)}
    results = rnn(None, None, inputs, return_states=True)[2][1:]
    gradients = torch.autograd.grad(results, operands, [torch.full_like(a, 2.0) for a in results])
    # torch's hardsigmoid has float32's sixth, and of a tanh near 1 few digits are left in 1 - y * y
    bound = {"rtol": 1e-4 if dtype is torch.float32 else 1e-7, "atol": 1e-30, "equal_nan": True}
    for name, found, gradient in zip(names, results, gradients):
        x = torch.tensor(VALUES, dtype=dtype, requires_grad=True)
        want = OF_TORCH[name][1](x)
        (dwant,) = torch.autograd.grad(want, x, torch.full_like(x, 2.0))
        for what, a, b in (("value", found.flatten(), want), ("gradient", gradient, dwant)):
            torch.testing.assert_close(a, b, **bound, msg=lambda text, name=name, what=what: f"{name}, {what}: {text}")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-7), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", OF_TORCH)
def test_tensors(name, dtype, bound):
    """Where a cell is called as a function."""
    found = []
    for function in OF_TORCH[name]:
        x = torch.tensor(VALUES, dtype=dtype, requires_grad=True)
        y = function(x)
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(*found, rtol=bound, atol=1e-30, equal_nan=True)
