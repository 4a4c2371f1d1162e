"""Derivatives beyond the first, transforms and stacks of a layer of every cell, against autograd through its rows."""

import pytest
import torch
from torch.func import vmap

from fastlstm import cells
from fastlstm.backends import reference
from fastlstm.backends.base import Layer
from tests.cells.functions import check, run
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
    stacked,
    truth,
)


@pytest.mark.sampled(3)
@masks
@directions
@every_cell
def test_all_derivatives(cell, reverse, masked):
    """Those that are derived, and derivatives of these, against autograd's own."""
    check(Case(cell, T=4, reverse=reverse, masked=masked))


# torch's check takes no argument that is not read, as x without a gate, and finds no derivative of a surrogate
CHECKED = [cell for cell in EVERY if cell.gates_of_x and cell is not gru_decay]


@pytest.mark.parametrize(
    "cell",
    [gru_decay, *(pytest.param(cell, marks=pytest.mark.slow) for cell in CHECKED)],
    ids=lambda cell: cell.name,
)
def test_gradgradcheck(cell):
    case = Case(cell, T=2, B=2, I=1, H=2, masked=True, seed=1)
    _, wanted = case.with_gradients()

    def function(*tensors):
        return run(case.filled(tensors))

    assert torch.autograd.gradcheck(function, wanted, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, wanted, check_fwd_over_rev=True)


@pytest.mark.sampled(3)
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
    """Stacks of layers, which share the rows equally: results and derivatives as of each layer alone."""
    cases = [Case(cell, masked=masked, reverse=masked, seed=k) for k in range(2)]
    layer, incoming = stacked(cases)
    operands = [None if a is None else a.clone().requires_grad_() for a in layer.tensors[:-2]]
    wanted = [a for a in operands if a is not None]
    made = run(Layer.of(cell, (*operands, layer.lengths, layer.reset), masked))
    found = differentiated(made, wanted, flat(incoming), create_graph=True)
    second = differentiated((curved(found),), wanted, ONE)
    for k, case in enumerate(cases):
        alone, single = case.with_gradients()
        want = truth(case.on(alone))
        rows = slice(k * case.B, (k + 1) * case.B)
        assert max(error(a[..., rows, :], b) for a, b in zip(made, want)) < OUTPUTS
        firsts = differentiated(want, single, flat(case.grads), create_graph=True)
        seconds = differentiated((curved(firsts),), single, ONE)
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
