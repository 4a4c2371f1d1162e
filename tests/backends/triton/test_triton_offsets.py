"""Offsets beyond 2^31, and more layers in a stack than a second axis of a grid may have.

Memory that is never touched costs nothing, so tensors are as large as they must be and one program alone is run.
"""

import pytest
import torch

from fastlstm import cells
from fastlstm.backends.base import Gradients, Layer, Run
from fastlstm.backends.triton import backward_pass, launch, resident, stepwise
from fastlstm.backends.triton import device as gpu
from tests.backends.triton.shared import DEVICE, backend

LONG = 2**31 + 64
KINDS = {"resident": resident, "stepwise": stepwise}


def half(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.float16) / 4


def untouched(*shape):
    return torch.empty(shape, device=DEVICE, dtype=torch.float16)


def apart(a):
    """`a` (T,B,N) with LONG elements from step to step."""
    far = untouched((a.shape[0] - 1) * LONG + a[0].numel()).as_strided(a.shape, (LONG, a.shape[2], 1))
    return far.copy_(a)


@pytest.fixture
def poisoned():
    """Overrides the fixture that writes NaN into new memory, which would touch all of it."""


@pytest.fixture
def first_program(monkeypatch):
    """What is launched runs in its first program alone."""

    class First:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return self.kernel[(1,) * len(grid)]

    for module in (resident, stepwise):
        for name in ("forward_kernel", "backward_kernel"):
            monkeypatch.setattr(module, name, First(getattr(module, name)))


def test_steps_far_apart(kernels):
    """x and the gradients of h and c; T 2, so that each takes 4 GB of address space."""
    T, B, I, H = 2, 3, 4, 16
    x, dh, dc = half(T, B, I), half(T, B, H), half(T, B, H)
    weights, states = (half(4 * H, I), half(4 * H, H), None, None), (half(B, H), half(B, H))
    results = []
    for far in (False, True):
        given, *grads = (apart(a) if far else a for a in (x, dh, dc))
        layer = Layer(given, weights, states, None, None, False, cells.lstm)
        run = backend.forward(layer, True)
        gradients = backend.backward(
            Run(grads[0], (None, None), (grads[1],)), layer, run, Gradients.of(cells.lstm, [True] * 7)
        )
        results.append([run.h, *run.saved, *(g for g in gradients.flat if g is not None)])
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


@pytest.mark.sampled(2)
def test_large_batches(kernels, first_program, monkeypatch):
    """The product of x, gates and dpreact of two steps: those of the second begin beyond 2^31."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 2**24)  # programs of 8 rows for any batch
    T, B, H, rows = 2, 2**24, 32, 8
    assert B * 4 * H >= 2**31
    x, weights, states = half(T, rows, 40), (half(4 * H, 40), half(4 * H, H)), (half(rows, H), half(rows, H))
    lengths, reset = torch.randint(0, T + 1, (rows,), device=DEVICE), torch.rand(T, rows, device=DEVICE) < 0.3
    dh = half(T, rows, H)
    product = launch.project
    results = []
    for batch in (rows, B):

        def widened(a, axis, batch=batch):
            wide = a.new_empty([batch if n == axis else size for n, size in enumerate(a.shape)])
            wide.narrow(axis, 0, rows).copy_(a)
            return wide

        monkeypatch.setattr(launch, "project", lambda x, *rest, w=widened: w(product(x[:, :rows], *rest), 1))
        both, steps = tuple(widened(a, 0) for a in states), (widened(lengths, 0), widened(reset, 1))
        layer = Layer(widened(x, 1), (*weights, None, None), both, *steps, False, cells.lstm)
        run = launch.Forward(layer, True, "native").run(layer)
        needs = Gradients.of(cells.lstm, [True] * 7)
        incoming = Run(widened(dh, 1), (None, None), ())
        found = backward_pass.Backward(layer, needs, "native").launch(incoming, layer, run)
        of_steps = (a[:, :rows].clone() for a in (run.h, *run.saved, found.preact))
        results.append([*of_steps, *(a[:rows].clone() for a in found.states)])
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)


def test_large_weights(first_program, monkeypatch):
    """Of one step, the 32 units whose weights one program reads; the last of their four rows begins beyond 2^31."""
    H, T = 27000, 2
    assert 3 * H * H >= 2**31
    weight, h_0, x = untouched(4 * H, H), half(1, H), half(T, 1, 1)
    preact, used = half(T, 1, 4 * H), torch.cat([torch.arange(32) + gate * H for gate in range(4)]).to(DEVICE)
    weight[used] = half(128, H) / 8
    monkeypatch.setattr(launch, "project", lambda *_: preact)
    layer = Layer(x[:1], (half(4 * H, 1), weight, None, None), (h_0, h_0), None, None, False, cells.lstm)
    h = launch.Forward(layer, True, "native").run(layer).h
    i, f, g, o = (preact[0, 0, used].double() + weight[used].double() @ h_0[0].double()).chunk(4)
    c = f.sigmoid() * h_0[0, :32].double() + i.sigmoid() * g.tanh()
    assert ((h[0, 0, :32].double() - o.sigmoid() * c.tanh()).abs() < 2e-3).all()  # fp16's 2^-11, and tanh.approx's


def test_more_layers_than_an_axis_has(kernels, monkeypatch):
    """Per-sample gradients of 65536 samples are as many layers, which only the first axis of a grid takes."""
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(launch, "pack_kernel", Recorded())
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(KINDS[kernels], name, Recorded())
    G, H = 65536, 2
    x, state = torch.zeros(1, G, 1, device=DEVICE), torch.zeros(G, H, device=DEVICE)
    weights = x.new_zeros(G, 4 * H, 1), x.new_zeros(G, 4 * H, H), None, None
    layer = Layer(x, weights, (state, state), None, None, False, cells.lstm)
    run = backend.forward(layer, True, "ieee")
    backend.backward(Run(run.h, (None, None), ()), layer, run, Gradients.of(cells.lstm, [True] * 7), "ieee")
    assert len(grids) == (4 if kernels == "resident" else 3)  # the last of which is for dh_0
    assert all(grid[0] >= G and all(size <= 65535 for size in grid[1:]) for grid in grids)
