"""Derivatives beyond the first, transforms and stacks of a layer of every cell, against autograd through its rows."""

import pytest
import torch
from torch.func import jvp, vmap

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends.base import Layer
from tests.cells.functions import run
from tests.cells.layers import (
    EVERY,
    GRADIENTS,
    ONE,
    OUTPUTS,
    Case,
    curved,
    differentiated,
    directions,
    error,
    every_cell,
    flat,
    gru_decay,
    masks,
    truth,
)


@masks
@directions
@every_cell
def test_second_derivatives(cell, reverse, masked):
    """Autograd of the derived first derivatives, which is the tangent and the curvature, against autograd's own."""
    case, results = Case(cell, T=4, reverse=reverse, masked=masked), []
    for layers in (truth, run):
        operands, wanted = case.with_gradients()
        grads = [g.clone().requires_grad_() for g in flat(case.grads)]
        first = differentiated(layers(case.on(operands)), wanted, grads, create_graph=True)
        results.append(differentiated((curved(first),), [*wanted, *grads], ONE))
    assert max(map(error, results[1], results[0])) < GRADIENTS


@pytest.mark.parametrize(
    "cell",
    [gru_decay, *(pytest.param(cell, marks=pytest.mark.slow) for cell in EVERY[:-2])],
    ids=lambda cell: cell.name,
)
def test_gradgradcheck(cell):
    case = Case(cell, T=2, B=2, I=1, H=2, masked=True, seed=1)
    operands, wanted = case.with_gradients()
    places = [k for k, a in enumerate(operands) if a is not None]

    def function(*tensors):
        given = list(operands)
        for k, a in zip(places, tensors):
            given[k] = a
        return run(case.on(given))

    assert torch.autograd.gradcheck(function, wanted, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, wanted, check_fwd_over_rev=True)


@masks
@every_cell
def test_jvp(cell, masked):
    case = Case(cell, T=4, masked=masked, reverse=masked)
    places = [k for k, a in enumerate(case.operands) if a is not None]
    primals = tuple(case.operands[k] for k in places)
    tangents = tuple(torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(3)) for a in primals)

    def by(layers):
        def function(*tensors):
            given = list(case.operands)
            for k, a in zip(places, tensors):
                given[k] = a
            return tuple(layers(case.on(given)))

        return jvp(function, primals, tangents)[1]

    want = by(truth)
    assert max(map(error, by(run), want)) < GRADIENTS
    assert max(map(error, by(lambda layer: flat(reference.forward(layer, True))), want)) < GRADIENTS


@masks
@pytest.mark.parametrize("cell", EVERY, ids=lambda cell: cell.name)
def test_vmap_over_the_plain_layer(cell, masked):
    """Over inputs and weights at once: an ensemble, each with a batch of its own."""
    cases = [Case(cell, masked=masked, seed=k) for k in range(3)]
    layers = [case.layer._replace(lengths=cases[0].layer.lengths, reset=cases[0].layer.reset) for case in cases]
    places = [k for k, a in enumerate(cases[0].operands) if a is not None]
    stacked = [torch.stack([list(layer.tensors)[k] for layer in layers]) for k in places]

    def function(*tensors):
        given = list(layers[0].tensors)
        for k, a in zip(places, tensors):
            given[k] = a
        return flat(reference.forward(Layer.of(cell, given, False), True))

    got = vmap(function)(*stacked)
    for k, layer in enumerate(layers):
        assert max(error(a[k], b) for a, b in zip(got, truth(layer))) < OUTPUTS


@masks
@pytest.mark.parametrize("cell", [cells.lstm, cells.peephole_lstm, cells.ind_rnn, gru_decay], ids=lambda c: c.name)
def test_a_stack_is_its_layers(cell, masked):
    """Weights with a leading axis of groups, rows in equal groups: results and derivatives as of each group alone."""
    cases = [Case(cell, masked=masked, reverse=masked, seed=k) for k in range(2)]

    def joined(parts, axis):
        return None if parts[0] is None else torch.cat(parts, axis)

    both = [case.layer for case in cases]
    layer = Layer(
        torch.cat([a.x for a in both], 1),
        tuple(None if pair[0] is None else torch.stack(pair) for pair in zip(*(a.weights for a in both))),
        tuple(joined(pair, 0) for pair in zip(*(a.states for a in both))),
        joined([a.lengths for a in both], 0),
        joined([a.reset for a in both], 1),
        masked,
        cell,
        tuple(joined(pair, 1) for pair in zip(*(a.inputs for a in both))),
    )
    operands = [None if a is None else a.clone().requires_grad_() for a in layer.tensors[:-2]]
    wanted = [a for a in operands if a is not None]
    grads = [torch.cat(pair, -2) for pair in zip(*(flat(case.grads) for case in cases))]
    made = run(Layer.of(cell, (*operands, layer.lengths, layer.reset), masked))
    found = differentiated(made, wanted, tuple(grads), create_graph=True)
    second = differentiated(
        (sum((g * g.detach().sin()).sum() for g in found),), wanted, (torch.ones((), dtype=torch.double),)
    )
    for k, case in enumerate(cases):
        alone, single = case.with_gradients()
        want = truth(case.on(alone))
        rows = slice(k * case.B, (k + 1) * case.B)
        assert max(error(a[..., rows, :], b) for a, b in zip(made, want)) < OUTPUTS
        firsts = differentiated(want, single, flat(case.grads), create_graph=True)
        seconds = differentiated(
            (sum((g * g.detach().sin()).sum() for g in firsts),), single, (torch.ones((), dtype=torch.double),)
        )
        for results, expected in ((found, firsts), (second, seconds)):
            places = [j for j, a in enumerate(operands) if a is not None]
            for j, a, b in zip(places, results, expected):
                of_weights = 1 <= j <= len(layer.weights)
                part = a[k] if of_weights else a[rows] if a.dim() == 2 else a[:, rows]
                assert error(part, b) < GRADIENTS


def test_a_compiler_sees_through_it():
    """dynamo finds each function that the derived source calls."""
    case = Case(gru_decay, T=2, masked=True)

    def function(*tensors):
        return flat(reference.forward(Layer.of(gru_decay, tensors, False), True))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*case.layer.tensors), function(*case.layer.tensors)))
