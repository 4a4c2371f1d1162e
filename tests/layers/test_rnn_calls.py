"""Calls of `fastlstm.RNN` of every kind: of layers of heads, of cells with norms, with inputs, with no product of x."""

import copy
import io
import itertools
from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fastlstm import cells
from tests.helpers.modules import randn
from tests.helpers.rnn import RNN, gadget, of_heads, of_heads_and_rows, of_products, without_x
from tests.helpers.tolerances import close
from tests.helpers.transforms import exporting

NORMS = (cells.dreamer_gru, cells.layer_norm_gru, cells.layer_norm_lstm)
KINDS = {
    "lstm": partial(RNN, cells.lstm, 3, 12, heads=3),
    "gru": partial(RNN, cells.gru, 3, 12, 2, heads=3),
    "gadget": partial(RNN, gadget, 3, 12, 2, heads=2),
    "without-x": partial(RNN, without_x, 0, 12, heads=2),
    "means-of-heads": partial(RNN, of_heads, 3, 64, heads=4),
    "means-of-both": partial(RNN, of_heads_and_rows, 3, 12, heads=3),
    "gru-before": partial(RNN, cells.gru_reset_before, 3, 9, 2),
    "products": partial(RNN, of_products, 3, 12, heads=3),
    **{cell.name: partial(RNN, cell, 3, 9) for cell in NORMS},
}
BACKENDS = ("numba", "reference")
of_both = pytest.mark.parametrize("backend", BACKENDS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, backend, is_small=False):
    """A module whose params are not the numbers they start from, so that each of them counts."""
    (cell, I, *_), heads = KINDS[kind].args, KINDS[kind].keywords.get("heads", 1)
    rnn = RNN(cell, I, 4, heads=min(heads, 2), backend=backend) if is_small else KINDS[kind](backend=backend)
    with torch.no_grad():
        for a in rnn.parameters():
            a += 0.1 * torch.randn_like(a)
    return rnn


def sequences_of(rnn, *size):
    """x and what the cell takes as inputs, by their names: views of one tensor, as a product gives them."""
    count, x = len(rnn.cell.inputs), randn(*size, rnn.input_size, grad=False)
    inputs = randn(*size, max(count, 1) * rnn.hidden_size, grad=False).chunk(max(count, 1), -1)
    return ({"x": x} if rnn.cell.gates_of_x else {}) | dict(zip(rnn.cell.inputs, (0.5 * a for a in inputs)))


def mapped(function, sequences):
    return {name: function(a) for name, a in sequences.items()}


def called(call, sequences, state=None, **options):
    inputs = {name: a for name, a in sequences.items() if name != "x"}
    return call(sequences.get("x"), state, inputs or None, **options)


@of_both
@each_kind
def test_calls_of_every_kind(kind, backend):
    """Single steps, a stream, one sequence alone, batch_first and packed sequences compute what `forward` does."""
    rnn, n = made(kind, backend), [5, 2, 3, 1]
    whole = sequences_of(rnn, 5, 4)
    output, last = called(rnn, whole)
    stream, state = rnn.stream(4), None
    for t, h in enumerate(output):
        now = mapped(lambda a, t=t: a[t], whole)
        h_t, state = called(rnn.step, now, state)
        close([h_t, called(lambda x, _, inputs: stream(x, inputs), now)], [h, h], "values")
    close([state, stream.state], [last, last], "values")
    close(called(rnn.step, mapped(lambda a: a[0, 1], whole))[0], output[0, 1], "values")
    close(called(rnn, mapped(lambda a: a[:, 1], whole))[0], output[:, 1], "values")
    if "x" in whole:
        masked, ends = called(rnn, whole, lengths=n)
        packed = pack_padded_sequence(whole["x"], n, enforce_sorted=False)
        again, ends_again = called(rnn, whole | {"x": packed})
        close([again.data, ends_again], [pack_padded_sequence(masked, n, enforce_sorted=False).data, ends], "values")
    else:  # an input of no features is one
        close(rnn(output[..., :0], inputs=whole)[0], output, "values")
    rnn.batch_first = True
    close(called(rnn, mapped(lambda a: a.transpose(0, 1), whole))[0].transpose(0, 1), output, "values")


@of_both
@pytest.mark.parametrize("kind", ["lstm", "gru", "gadget", "without-x", "products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_and_autocast(kind, backend, dtype):
    exact = made(kind, backend)
    rnn, sequences = copy.deepcopy(exact).float(), sequences_of(exact, 5, 4)
    want, _ = called(exact, sequences)
    for training in (False, True):
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(training):
            close(called(rnn, mapped(torch.Tensor.float, sequences))[0], want, "cast")
    output, _ = called(rnn.to(dtype), mapped(lambda a: a.to(dtype), sequences))
    close(output, want, "cast")
    output.sum().backward()
    assert {a.grad.dtype for a in rnn.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("lstm", "reference"),  # a compiler sees one operator whatever the backend
        *itertools.product(("without-x", "means-of-heads", "products", NORMS[-1].name), ["numba"]),
    ],
)
def test_compiled_and_exported(kind, backend):
    rnn, file = made(kind, backend), io.BytesIO()
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    sizes = {0: torch.export.Dim("T", max=99), 1: torch.export.Dim("B", max=99)}
    sequences, names = mapped(torch.Tensor.contiguous, sequences_of(rnn, 5, 4)), ("input", "states", "inputs")
    shapes = dict(zip(names, called(lambda *arguments: arguments, dict.fromkeys(sequences, sizes))))
    with exporting():
        arguments = called(lambda *arguments: arguments, sequences)
        torch.export.save(torch.export.export(rnn, arguments, dynamic_shapes=shapes), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for T, B in ((5, 4), (7, 2)):
        sequences = mapped(torch.Tensor.contiguous, sequences_of(rnn, T, B))
        want, last = called(rnn, sequences)
        close([called(f, sequences)[0] for f in (compiled, program)], [want, want], "values")
        close(called(compiled, sequences, last)[0], called(rnn, sequences, last)[0], "values")
        gradients = [
            torch.autograd.grad(called(f, sequences)[0].sum(), list(rnn.parameters())) for f in (compiled, rnn)
        ]
        close(*gradients, "gradients")
