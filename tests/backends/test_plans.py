"""Calls of the CPU's kernels beside plain PyTorch in float64: the first of a signature, and those that follow its plan.

Sums of the bits are compared where they must not depend on how a call is made. A test with weights that others write
to is in `tests/plan`.
"""

import copy

import pytest
import torch

import fastlstm
from tests.helpers.calls import Calls
from tests.helpers.layers import CPU_BACKENDS, UNAVAILABLE, needs_native
from tests.helpers.modules import called, flat, inputs_of, modules_of, results, same
from tests.helpers.numba import needs_pieces, needs_unit
from tests.helpers.tolerances import BF16, F32, F64, close

F16 = torch.float16
NATIVE = [pytest.param(kind, "native", marks=needs_native) for kind in (fastlstm.LSTM, fastlstm.GRU)]
KINDS = [(fastlstm.LSTM, "numba"), (fastlstm.GRU, "numba"), *NATIVE]
each_kind = pytest.mark.parametrize(("kind", "backend"), KINDS)
CELLS = {fastlstm.LSTM: fastlstm.LSTMCell, fastlstm.GRU: fastlstm.GRUCell}
# T, B, I, H: one step; few rows and many; full panels and a last one cut off; x wide enough for a sum of its own
SIZES = [(1, 1, 1, 1), (1, 3, 5, 7), (1, 7, 100, 16), (5, 1, 7, 32), (5, 7, 1, 33), (7, 2, 20, 100), (3, 100, 7, 1)]
SIZES += [(40, 70, 3, 9), (3, 130, 28, 64), (2, 3, 650, 100), (9, 16, 30, 33), (3, 1, 6, 650)]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("form", ["plain", "masks", "directions"])
@each_kind
def test_results_and_gradients(kind, backend, form, dtype, poisoned, two_threads):
    """On either number of threads, in the first call and the second, and in calls without gradients: the same bits."""
    for k, (T, B, I, H) in enumerate(SIZES):
        module, exact = modules_of(kind, backend, I, H, dtype, bidirectional=form == "directions")
        inputs, masks = inputs_of(module, T, B, states=k % 3 > 0), {}
        directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
        if form != "plain":
            masks["lengths"] = torch.randint(0, T + 1, (B,))
            masks["lengths"][0], masks["lengths"][-1] = T, 0  # of one row, it has no step
            held = torch.arange(T).unsqueeze(1) >= masks["lengths"]
            inputs[0][held] = torch.nan  # padding, and the gradients of its outputs, are not looked at
            directions[0][held] = torch.nan
        if form == "masks":
            masks["reset"] = torch.rand(T, B) < 0.3
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [results(module, inputs, directions, **masks) for _ in range(2)]
            with torch.no_grad():
                for _ in range(2):
                    assert same(called(module, inputs[0], inputs[1:], **masks), found[0][: len(directions)])
        assert all(same(other, found[0]) for other in found[1:])
        close(found[0], results(exact, inputs, directions, **masks), "long", where=str((T, B, I, H)))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        *KINDS,
        pytest.param(fastlstm.LSTM, "numba-bf16", marks=needs_unit),
        *(pytest.param(fastlstm.LSTM, f"numba-{name}", marks=needs_pieces) for name in ("bf16x3", "bf16x6")),
    ],
)
def test_one_gradient_alone(kind, backend):
    """Also where it is the first that packs weights to keep them, of which it may not read all; and of one output."""
    for T, B, I, H in ((1, 5, 40, 33), (1, 7, 40, 1), (6, 5, 40, 33), (1, 3, 650, 100)):
        module = kind(I, H, backend=backend)
        inputs = inputs_of(module, T, B)
        directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
        tensors = [*inputs, *module.parameters()]
        everything = results(module, inputs, directions)[len(directions) :]
        for n, wanted in enumerate(tensors):
            fresh = copy.deepcopy(module)
            tensors = [a.detach() for a in inputs] + list(fresh.parameters())
            for k, a in enumerate(tensors):
                a.requires_grad_(k == n)
            outputs = called(fresh, tensors[0], tensors[1 : len(inputs)])
            (got,) = torch.autograd.grad(outputs, tensors[n], directions)
            assert torch.equal(got, everything[n]), (n, wanted.shape)
            tensors[n].requires_grad_(False)
    for k in range(len(directions)):
        inputs = [a.detach().requires_grad_() for a in inputs]
        outputs = called(module, inputs[0], inputs[1:])
        zeros = [a if n == k else torch.zeros_like(a) for n, a in enumerate(directions)]
        absent = torch.autograd.grad(outputs[k], inputs, directions[k], retain_graph=True)
        assert same(absent, torch.autograd.grad(outputs, inputs, zeros))


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("size", [(1, 7, 100), (100, 40, 7), (3, 650, 64)])
@each_kind
def test_one_step(kind, backend, size, dtype, poisoned):
    """Of a sequence, of `step` and of a cell: the same bits, and the second finds packed weights."""
    (B, I, H), cell = size, CELLS[kind](*size[1:], dtype=dtype, backend=backend)
    module = kind(I, H, dtype=dtype, backend=backend)
    module.load_state_dict({f"{name}_l0": a for name, a in cell.state_dict().items()})
    x, *states = inputs_of(module, 1, B)
    directions = [torch.randn_like(a) for a in states]
    for _ in range(2):
        found = []
        for each in (module, module.step, cell):
            a, *given = (a.clone().requires_grad_() for a in (x[0], *(s[0] for s in states)))
            if each is cell:
                last = called(cell, a, given)
            else:
                hx = tuple(s[None] for s in given) if kind is fastlstm.LSTM else given[0][None]
                output, last = each(a[None] if each is module else a, hx)
                last = [s[0] for s in flat(last)]
                assert torch.equal(output.view_as(last[0]), last[0])
            weights = list((cell if each is cell else module).parameters())
            gradients = torch.autograd.grad(last, [a, *given, *weights], [d[0] for d in directions])
            found.append([*last, *gradients])
        assert same(found[1], found[0])
        assert same(found[2], found[0])
        with torch.no_grad():
            assert same(called(cell, x[0], [s[0] for s in states]), found[0][: len(states)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("I", "H"), [(200, 272), (17, 528), (100, 650)])
def test_large_weights_of_one_step(I, H, dtype, masked, poisoned, monkeypatch):
    """Few rows read them where they lie, and have the bits of many rows, whose weights are packed."""
    module, exact = modules_of(fastlstm.LSTM, "numba", I, H, dtype)
    inputs, calls = inputs_of(module, 1, 40), Calls(monkeypatch, "numba")
    with torch.no_grad():
        called(module, inputs[0][:, :1], [a[:, :1] for a in inputs[1:]])
    assert calls.count("pack") == 0
    lengths = torch.randint(0, 2, (40,)) if masked else torch.ones(40, dtype=torch.int64)
    lengths[1] = not masked
    inputs[0][:, lengths == 0] = torch.nan
    directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
    many = results(module, inputs, directions, lengths=lengths)
    close(many, results(exact, inputs, directions, lengths=lengths), "long")
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6), slice(8, 40)):
        few, of_rows = [a[:, rows] for a in inputs], [a[:, rows] for a in directions]
        got = results(module, few, of_rows, lengths=lengths[rows])
        assert same(got[:6], [a[:, rows] for a in many[:6]])  # to the gradients of the states
        with torch.no_grad():
            assert same(called(module, few[0], few[1:], lengths=lengths[rows]), got[:3])
        close(got, results(exact, few, of_rows, lengths=lengths[rows]), "long")


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("masked", [False, True])
@each_kind
def test_sixteen_bits(kind, backend, masked, dtype, poisoned):
    """They are computed in float32 and rounded once, but for products of bfloat16 where the processor has them."""
    for T, B, I, H in ((1, 1, 7, 100), (5, 7, 100, 33), (9, 40, 1, 16)):
        module = kind(I, H, dtype=dtype, backend=backend)
        wide = copy.deepcopy(module).float()
        if (backend, dtype) == ("numba", BF16) and UNAVAILABLE["numba-bf16"] is None:
            wide.backend = "numba-bf16"
        inputs = inputs_of(module, T, B)
        inputs[0] = inputs[0].transpose(0, 1).contiguous().transpose(0, 1)
        masks = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3} if masked else {}
        directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
        want = [a.to(dtype) for a in results(wide, inputs, directions, **masks)]
        count = len(directions)  # of outputs, before the gradients
        for _ in range(2):
            got = results(module, inputs, directions, **masks)
            assert same(got[:count], want[:count])
            if kind is fastlstm.GRU and wide.backend == "numba-bf16" and T > 1:
                # Its backward pass also reads h outside of products, which is bfloat16 here and float32 there, but for
                # h_0. A rounding of h is 2^-8 of a difference h - n, and may move the factor of a product to its
                # neighbour, by 2^-8. So each term of a sum errs by 2^-7, and the sum's own rounding adds 2^-8.
                for a, b in zip(got[count:], want[count:], strict=True):
                    assert (a.float() - b.float()).abs().max() <= 2**-6 * b.abs().max()
            else:
                assert same(got, want)
        with torch.no_grad():
            assert same(called(module, inputs[0], inputs[1:], **masks), want[:count])


@pytest.mark.parametrize("dtype", [F32, F64])
@each_kind
def test_a_row_alone_is_what_it_is_in_a_batch(kind, backend, dtype):
    for I, H in ((7, 1), (30, 100), (28, 128)):
        module = kind(I, H, dtype=dtype, backend=backend)
        inputs = inputs_of(module, 5, 33)
        lengths, reset = torch.randint(0, 6, (33,)), torch.rand(5, 33) < 0.3
        directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
        whole = results(module, inputs, directions, lengths=lengths, reset=reset)
        for b in (0, 5, 31):
            row = slice(b, b + 1)
            alone = results(module, [a[:, row] for a in inputs], [a[:, row] for a in directions],
                            lengths=lengths[row], reset=reset[:, row])  # fmt: skip
            of_rows = len(directions) + len(inputs)
            assert same(alone[:of_rows], [a[:, row] for a in whole[:of_rows]])


@pytest.mark.parametrize("which", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_bias_alone(backend, T, which):
    tensors, found = [torch.randn(*size, dtype=F64) for size in ((T, 3, 7), (132, 7), (132, 33), (132,))], []
    for name in (backend, backend, "reference"):
        x, *weights, bias = (a.clone().requires_grad_() for a in tensors)
        output, (_, c_n) = fastlstm.lstm(x, None, *weights, **{which: bias}, backend=name)
        found.append([output, c_n, *torch.autograd.grad((output * 2).sum() + c_n.sum(), [x, *weights, bias])])
    assert same(*found[:2])
    close(found[0], found[2], "gradients")
