"""The native backend's calls and plans of calls of either cell, beside the reference in float64."""

import threading

import pytest
import torch

from fastlstm import cells
from fastlstm.backends import native, reference
from fastlstm.backends.base import Gradients, Layer, Run

NOT_BUILT = native.supports(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(NOT_BUILT is not None, reason=str(NOT_BUILT))

# Rounding alone, as a part of the largest value: 100 units in the last place, for sums of some hundred terms.
BOUNDS = {torch.float32: 1.2e-5, torch.float64: 2.3e-14}
SIZES = [(1, 1, 1, 1), (1, 3, 5, 7), (5, 7, 1, 33), (7, 2, 20, 100), (40, 70, 3, 9), (3, 130, 28, 64)]


@pytest.fixture(autouse=True)
def poisoned():
    """New memory is NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[cells.lstm, cells.gru], ids=lambda cell: cell.name)
def cell(request):
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def draw(cell, T, B, I, H, *, lengths=False, reset=False, reverse=False, groups=()):
    """A layer in float64 of numbers that float32 has as well; padding is NaN."""
    x, blocks = torch.randn(T, B, I), len(cell.layout.of_x)
    ends = torch.randint(-1, T + 2, (B,)) if lengths else None
    if ends is not None:
        ends[0], ends[-1] = T, 0  # of one row, it has no step
        x[torch.arange(T).unsqueeze(1) >= ends] = torch.nan
    weights = [torch.randn(*groups, blocks * H, k) * H**-0.5 for k in (I, H)] + [
        torch.randn(*groups, blocks * H) for _ in range(2)
    ]
    resets = torch.rand(T, B) < 0.3 if reset else None
    states = tuple(torch.randn(B, H) for _ in cell.states)
    return to(Layer(x, tuple(weights), states, ends, resets, reverse, cell), torch.float64)


def all_of(cell, states=True):
    """That all gradients are wanted, or all but those of the states."""
    return Gradients(True, (True,) * 4, (states,) * len(cell.states))


def to(record, dtype):
    """A layer or a run in another floating-point type."""
    if isinstance(record, Layer):
        made = [a.to(dtype) if a is not None and a.is_floating_point() else a for a in record.tensors]
        return Layer.of(record.cell, made, record.reverse)
    return Run(record.h.to(dtype), tuple(a.to(dtype) for a in record.last), tuple(a.to(dtype) for a in record.kept))


def gradients_of(layer, cells=True):
    """Gradients of all results. Those of held steps, which are not looked at, are NaN."""
    (T, B), H, (_, *others) = layer.x.shape[:2], layer.weights[1].shape[-1], layer.cell.states
    dh = torch.randn(T, B, H)
    if layer.lengths is not None:
        dh[torch.arange(T).unsqueeze(1) >= layer.lengths] = torch.nan
    last = tuple(torch.randn(B, H) for _ in layer.cell.states)
    return to(Run(dh, last, tuple(torch.randn(T, B, H) for _ in others if cells)), torch.float64)


def truth_of(layer, grads, needs):
    """The reference's results and gradients."""
    run = reference.forward(layer, True)
    return run, reference.backward(grads, layer, run, needs)


def states_of(run):
    """All results that do not depend on the backend."""
    return run.h, *run.last, *run.kept[:-1]


def close(got, want, dtype):
    if want is None:
        assert got is None
        return
    scale = want.abs().max().clamp(min=1.0) if want.numel() else 1.0
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert not want.numel() or ((got - want).abs().max() / scale).item() < BOUNDS[dtype]


def alike(run, other):
    """The same bits, whatever the leading axes of the states."""
    for a, b in zip((run.h, *run.last), (other.h, *other.last)):
        assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("lengths", "reset"), [(False, False), (True, False), (False, True), (True, True)])
def test_results_and_gradients_are_the_references(cell, lengths, reset, reverse, dtype, threads):
    needs = all_of(cell)
    for size in SIZES:
        layer = draw(cell, *size, lengths=lengths, reset=reset, reverse=reverse)
        grads = gradients_of(layer)
        truth, want = truth_of(layer, grads, needs)
        layer, grads, kept = to(layer, dtype), to(grads, dtype), {}
        run = native.forward(layer, True)
        assert len(run.kept) == len(cell.states)
        got = native.backward(grads, layer, run, needs)
        for a, b in zip((*states_of(run), *got.flat), (*states_of(truth), *want.flat)):
            close(a, b, dtype)
        for save in (True, False, True):
            plan = native.plan(layer, save, kept, ())
            for _ in range(2):
                made = plan.forward(layer)
                alike(made, run)
            if save:
                for a, b in zip(plan.backward(grads, layer, made, needs).flat, got.flat):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("ends", [(), (1,)])
@pytest.mark.parametrize("states", [True, False])
def test_states_may_have_a_leading_axis_or_be_absent(cell, states, ends):
    layer, needs = draw(cell, 3, 5, 4, 9), all_of(cell, states)
    if not states:
        layer = layer._replace(states=(None,) * len(cell.states))
    grads = gradients_of(layer)
    truth, want = truth_of(layer, grads, needs)
    layer = layer._replace(states=tuple(a if a is None else a.view(*ends, 5, 9) for a in layer.states))
    grads = grads._replace(last=tuple(a.view(*ends, 5, 9) for a in grads.last))
    plan = native.plan(layer, True, {}, ends)
    run = plan.forward(layer)
    got = plan.backward(grads, layer, run, needs)
    assert [a.shape for a in run.last] == [(*ends, 5, 9)] * len(cell.states)
    for a, b in zip((*run.last, *got.states), (*truth.last, *want.states)):
        close(a if a is None else a.view(5, 9), b, torch.float64)
    assert got.states[0] is None or got.states[0].shape == (*ends, 5, 9)
    for a, b in zip(got.weights, want.weights):
        close(a, b, torch.float64)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_one_step_without_an_axis(cell, biases):
    layer = draw(cell, 1, 5, 4, 9)
    layer = layer._replace(weights=(*layer.weights[:2], *(a if b else None for a, b in zip(layer.weights[2:], biases))))
    needs = all_of(cell)._replace(weights=(True, True, *biases))
    grads = gradients_of(layer, cells=False)._replace(h=None)
    truth, want = truth_of(layer, grads, needs)
    step = layer._replace(x=layer.x[0])
    plan = native.plan(step, True, {}, ())
    run = plan.forward(step)
    got = plan.backward(grads, step, run, needs)
    assert run.h is None
    assert torch.equal(native.plan(step, False, {}, ()).forward(step).last[0], run.last[0])
    for a, b in zip((*run.last, got.x, *got.weights, *got.states), (*truth.last, want.x[0], *want.flat[1:])):
        close(a, b, torch.float64)
    dbias_ih, dbias_hh = got.weights[2:]
    assert None in (dbias_ih, dbias_hh) or dbias_ih.data_ptr() != dbias_hh.data_ptr()


@pytest.mark.parametrize("own_axis", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_stack_is_its_layers_one_after_the_other(cell, masked, own_axis):
    layer, needs = draw(cell, 4, 6, 5, 9, lengths=masked, reset=masked, groups=(3,), reverse=masked), all_of(cell)
    grads = gradients_of(layer)
    truth, want = truth_of(layer, grads, needs)
    if own_axis:
        layer = layer._replace(x=layer.x.view(4, 3, 2, 5))
    for save in (False, True):
        run = native.forward(layer, save)
        for a, b in zip((run.h, *run.last), (truth.h, *truth.last), strict=True):
            close(a, b, torch.float64)
    for a, b in zip(native.backward(grads, layer, run, needs).flat, want.flat, strict=True):
        close(a, b, torch.float64)


def change_data(weight):
    weight.data[-1] += 1


def change_numpy(weight):
    weight.detach().numpy()[..., 0] += 1


@pytest.mark.parametrize("change", [change_data, change_numpy])
@pytest.mark.parametrize("H", [9, 300])  # kept packed, and too large for that in one step
@pytest.mark.parametrize(("T", "save"), [(1, False), (1, True), (4, False)])
def test_changed_weights_are_seen(cell, T, save, H, change, threads):
    layer = draw(cell, T, 3, 300 if H == 300 else 5, H)
    plan = native.plan(layer, save, {}, ())
    alike(plan.forward(layer), native.forward(layer, save))
    for weight in layer.weights:
        change(weight)
        alike(plan.forward(layer), native.forward(layer, save))
    others = layer._replace(weights=tuple(a + 1 for a in layer.weights))
    alike(plan.forward(others), native.forward(others, save))


def test_plans_of_one_layer_share_what_is_packed(cell):
    layer, kept = draw(cell, 4, 6, 5, 9), {}
    native.plan(layer, False, kept, ()).forward(layer)
    (packed,) = kept.values()
    for other in (layer._replace(x=layer.x[:2]), layer._replace(x=layer.x[:1])):
        for save in (False, True):
            native.plan(other, save, kept, ()).forward(other)
    assert list(kept.values()) == [packed]
    narrow = to(layer, torch.float32)
    alike(native.plan(narrow, False, kept, ()).forward(narrow), native.forward(narrow, False))
    assert len(kept) == 1


def test_packed_weights_of_another_cell_are_packed_again():
    kept = {}
    for cell in (cells.lstm, cells.gru, cells.lstm):
        layer = draw(cell, 4, 6, 5, 9)
        alike(native.plan(layer, False, kept, ()).forward(layer), native.forward(layer, False))
    assert len(kept) == 1


def test_strides_of_any_kind(cell):
    layer, needs = draw(cell, 4, 6, 5, 9, lengths=True, reset=True), all_of(cell)
    want = native.forward(layer, True)
    strided = [None if a is None else torch.stack([a, a], -1)[..., 0] for a in layer.tensors]
    rows_first = layer.x.transpose(0, 1).contiguous().transpose(0, 1)
    for other in (Layer.of(cell, strided, False), layer._replace(x=rows_first)):
        alike(native.plan(other, False, {}, ()).forward(other), want)
        grads = gradients_of(layer)
        for a, b in zip(
            native.backward(grads, other, want, needs).flat, native.backward(grads, layer, want, needs).flat
        ):
            assert torch.equal(a, b)


def test_no_rows(cell):
    layer, needs = draw(cell, 3, 0, 5, 9), all_of(cell)
    plan = native.plan(layer, True, {}, (1,))
    run = plan.forward(layer)
    assert run.h.shape == (3, 0, 9)
    assert run.last[0].shape == (1, 0, 9)
    got = plan.backward(gradients_of(layer), layer, run, needs)
    assert all(a.count_nonzero() == 0 for a in got.flat)


def test_threads_of_python_share_a_plan():
    """While the weights change, any result may come; afterwards only theirs does."""
    layer = draw(cells.lstm, 2, 3, 5, 40)
    plan, weights, done = native.plan(layer, False, {}, ()), [a.clone() for a in layer.weights], threading.Event()

    def call():
        while not done.is_set():
            plan.forward(layer)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for k in range(300):
        for a, b in zip(layer.weights, weights):
            torch.add(b, k, out=a)
    done.set()
    for caller in callers:
        caller.join()
    alike(plan.forward(layer), native.forward(layer, False))
