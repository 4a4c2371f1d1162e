"""Plans: what they compute, whatever happens to the weights, and that they compute what `forward` and `backward` do."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastlstm import cells
from fastlstm.backends import numba, reference
from fastlstm.backends.base import Gradients, Layer, Run

# Of the largest value: roundings in sums over up to 1000 rows, and of 16-bit results one rounding of theirs.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ALL = Gradients(True, (True,) * 4, (True,) * 2)
# T, B, I, H: one step; few rows and many; full panels and a last one cut off; x wide enough for a sum of its own, or
# for the matrix unit
SIZES = [
    (1, 1, 7, 7),
    (1, 7, 100, 16),
    (5, 1, 7, 32),
    (7, 7, 1, 100),
    (3, 100, 7, 1),
    (9, 16, 30, 33),
    (2, 3, 650, 100),
]


def layer_of(size, dtype=torch.float32, *, masks=False, reverse=False, states=True, stack=()):
    """A layer with random operands. With `masks` one row has no step, one has all, and what padding holds is NaN."""
    T, B, I, H = size
    generator = torch.Generator().manual_seed(T * B + I * H + reverse)

    def random(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    x, scale = random(T, B, I), (I + H) ** -0.5
    weights = (random(*stack, 4 * H, n, scale=scale) for n in (I, H))
    biases = (random(*stack, 4 * H) for _ in range(2))
    lengths = reset = None
    if masks:
        lengths = torch.randint(0, T + 1, (B,), generator=generator)
        lengths[0], lengths[-1] = 0, T + 1  # a row of more steps than there are has all of them
        reset = torch.rand(T, B, generator=generator) < 0.3
        x[torch.arange(T).unsqueeze(1) >= lengths] = float("nan")
    given = (random(B, H), random(B, H)) if states else (None, None)
    return Layer(x, (*weights, *biases), given, lengths, reset, reverse, cells.lstm)


def rows_of(layer, rows):
    """The layer of some of its batch rows."""
    lengths, reset = layer.lengths, layer.reset
    return layer._replace(
        x=layer.x[:, rows],
        states=(*(a[rows] for a in layer.states),),
        lengths=None if lengths is None else lengths[rows],
        reset=None if reset is None else reset[:, rows],
    )


def gradients_of(run, dtype=None):
    """Incoming gradients of a run: of its outputs, also where steps are held, and of its last states."""
    generator = torch.Generator().manual_seed(1)
    outputs = (None if a is None else torch.randn(a.shape, generator=generator) for a in (run.h, *run.last))
    dh, *last = (a if a is None else a.to(dtype or b.dtype) for a, b in zip(outputs, (run.h, *run.last)))
    return Run(dh, (*last,), ())


def cast(record, dtype):
    """A layer, or a run of gradients, in another type."""
    to = lambda a: a.to(dtype) if a is not None and a.is_floating_point() else a  # noqa: E731
    if isinstance(record, Layer):
        return Layer.of(cells.lstm, [to(a) for a in record.tensors], record.reverse)
    return Run(to(record.h), (*map(to, record.last),), (*map(to, record.kept),))


def flat(run, gradients=None):
    """The results that users see."""
    return [a for a in (run.h, *run.last, *(gradients.flat if gradients else ())) if a is not None]


def error(got, want):
    got, want = got.double(), want.double().reshape(got.shape)
    return ((got - want).abs().max() / want.abs().max().clamp(min=1e-3)).item() if got.numel() else 0.0


def assert_close(got, want, dtype):
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want)):
        assert error(a, b) < TOLERANCES[dtype], k


def assert_same(got, want):
    assert len(got) == len(want)
    for k, (a, b) in enumerate(zip(got, want)):
        assert torch.equal(a, b.reshape(a.shape)), k


def called(layer, kept=None, ends=(), module=numba, plan=None):
    """The results of a layer's plan, and the gradients."""
    plan = plan or module.plan(layer, True, kept, ends)
    run = plan.forward(layer)
    return flat(run, plan.backward(gradients_of(run), layer, run, ALL))


def true(layer):
    """The same in float64."""
    layer = cast(layer, torch.float64)
    run = reference.forward(layer, True)
    return flat(run, reference.backward(gradients_of(run), layer, run, ALL))


@pytest.mark.parametrize("kept", [None, {}])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_results_and_gradients(size, dtype, reverse, masks, kept, poisoned):
    layer = layer_of(size, dtype, masks=masks, reverse=reverse)
    want, kept = true(layer), kept if kept is None else {}
    plan, infers = numba.plan(layer, True, kept, ()), numba.plan(layer, False, kept, ())
    run = numba.forward(layer, True)
    of_functions = flat(run, numba.backward(gradients_of(run), layer, run, ALL))
    for _ in range(2):
        got = called(layer, plan=plan)
        assert_close(got, want, dtype)
        assert_same(got, of_functions)
        assert_same(flat(infers.forward(layer)), got[:3])


@pytest.mark.parametrize("masks", [False, True])
def test_threads_change_no_bit(masks):
    layer, before = layer_of((9, 70, 40, 100), masks=masks), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found += [called(layer), flat(numba.plan(layer, False, {}, ()).forward(layer))]
    torch.set_num_threads(before)
    assert_same(found[0], found[2])
    assert_same(found[1], found[3])


def test_outputs_of_held_steps_are_zero_and_their_gradients_are_not_read():
    layer = layer_of((7, 16, 5, 20), masks=True)
    run = numba.forward(layer, True)
    held = torch.arange(7).unsqueeze(1) >= layer.lengths
    assert not run.h[held].any()
    grads = gradients_of(run)
    want = numba.backward(grads, layer, run, ALL).flat
    grads.h[held] = float("nan")
    assert_same(numba.backward(grads, layer, run, ALL).flat, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ends", [(), (1,)])
@pytest.mark.parametrize("kept", [None, {}])
@pytest.mark.parametrize("size", [(1, 1, 7, 100), (1, 100, 40, 7), (1, 3, 650, 64)])
def test_one_step(size, kept, ends, dtype, poisoned):
    layer, kept = layer_of(size, dtype), kept if kept is None else {}
    layer = layer._replace(states=(*(a.reshape(*ends, *a.shape) for a in layer.states),))
    step = layer._replace(x=layer.x[0])
    plans = [numba.plan(a, save, kept, ends) for save in (True, False) for a in (layer, step)]
    for _ in range(2):
        runs = [plan.forward(a) for plan, a in zip(plans, (layer, step) * 2)]
        assert runs[1].h is None
        assert runs[1].last[0].shape == (*ends, size[1], size[3])
        for run in runs:
            assert_same(run.last, runs[0].last)
        grads = gradients_of(runs[1])
        want = plans[0].backward(grads, layer, runs[0], ALL)
        assert_same(plans[1].backward(grads, step, runs[1], ALL).flat, want.flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", range(4))
@pytest.mark.parametrize("T", [1, 4])
def test_changed_weights_are_seen(T, n, dtype):
    layer, kept = layer_of((T, 3, 40, 33), dtype), {}
    infers, plan = numba.plan(layer, False, kept, ()), numba.plan(layer, True, kept, ())
    called(layer, plan=plan)
    infers.forward(layer)
    for change in range(3):
        run = plan.forward(layer)
        if change == 0:
            layer.weights[n].data.view(-1)[-1] += 1
        elif change == 1:
            layer.weights[n].view(torch.int16).numpy()[..., -1] ^= 1
        else:  # another tensor, as `functional_call` gives
            layer = layer._replace(weights=(*(a.neg() for a in layer.weights),))
        want = called(layer, None)
        assert_same(flat(infers.forward(layer)), want[:3])
        assert_same(called(layer, plan=plan), want)
        fresh = numba.plan(layer, True, None, ())
        got = plan.backward(gradients_of(run), layer, run, ALL)  # of a run before the change: the weights of now
        assert_same(got.flat, fresh.backward(gradients_of(run), layer, run, ALL).flat)


def test_one_packed_copy_serves_all_shapes():
    kept = {}
    for T, B in ((1, 1), (1, 9), (5, 3)):
        layer = layer_of((T, B, 40, 33))
        for save in (True, False):
            plan = numba.plan(layer, save, kept, ())
            run = plan.forward(layer)
            if save:
                plan.backward(gradients_of(run), layer, run, ALL)
    assert len(kept) == 2  # the forward and the backward pass


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "size", [(1, 1, 100, 650), (1, 1, 17, 512), (1, 1, 200, 272), (1, 2, 40, 512), (1, 1, 3, 528), (1, 9, 100, 528)]
)
def test_large_weights_of_one_step_are_not_kept(size, dtype, states, poisoned):
    layer, kept = layer_of(size, dtype, states=states), {}
    want = true(layer)
    for save in (True, False):
        assert_close(flat(numba.plan(layer, save, kept, ()).forward(layer)), want[:3], dtype)
    assert not kept
    for _ in range(2):
        assert_close(called(layer, kept), want, dtype)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("I", [17, 200])
def test_rows_whose_weights_nobody_packs_have_the_bits_of_many_rows(I, dtype, masks):
    layer = layer_of((1, 20, I, 528), dtype, masks=masks)
    many = numba.plan(layer, False, None, ()).forward(layer)
    for rows in (slice(0, 1), slice(1, 2), slice(0, 3), slice(12, 20)):
        few = rows_of(layer, rows)
        run = numba.plan(few, False, None, ()).forward(few)
        assert_same(flat(run), [many.h[:, rows], *(a[rows] for a in many.last)])


def test_a_held_row_whose_weights_nobody_packs_leaves_zeros():
    layer = layer_of((1, 1, 40, 512))
    layer.x.fill_(float("nan"))
    held = layer._replace(lengths=torch.zeros(1, dtype=torch.long))
    run = numba.plan(held, True, None, ()).forward(held)
    assert not run.h.any()
    assert not run.kept[-1].any()  # the gates: what an operator returns is to be the same at every run
    assert_same(run.last, layer.states)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("I", "H"), [(200, 272), (16, 512), (48, 1040)])
def test_gradients_by_weights_that_nobody_packs_have_the_bits_of_packed_ones(I, H, dtype, masks, poisoned):
    """Of one row, and of few rows of large weights."""
    layer = layer_of((1, 40, I, H), dtype, masks=masks)
    plan = numba.plan(layer, True, None, ())
    run = plan.forward(layer)
    grads = gradients_of(run)
    many = plan.backward(grads, layer, run, ALL)
    for rows in (slice(0, 1), slice(1, 6), slice(8, 40)):
        few = rows_of(layer, rows)
        plan = numba.plan(few, True, {}, ())
        run = plan.forward(few)
        of_rows = Run(grads.h[:, rows], (*(a[rows] for a in grads.last),), (*(a[:, rows] for a in grads.kept),))
        got = plan.backward(of_rows, few, run, ALL)
        assert_same((got.x, *got.states), (many.x[:, rows], *(a[rows] for a in many.states)))
        wide = cast(few, torch.float64)
        run = reference.forward(wide, True)
        want = reference.backward(cast(of_rows, torch.float64), wide, run, ALL)
        assert_close(got.flat, want.flat, dtype)


@pytest.mark.parametrize("T", [1, 5])
def test_python_threads_share_a_plan(T):
    layers = [layer_of((T, 4, 30, 50)) for _ in range(4)]
    for k, layer in enumerate(layers):
        for a in layer.weights:
            a.mul_(1 + k)
    kept, wants = {}, [called(layer) for layer in layers]
    plan, infers = numba.plan(layers[0], True, kept, ()), numba.plan(layers[0], False, kept, ())

    def work(k):
        for _ in range(50):
            assert_same(called(layers[k], plan=plan), wants[k])
            assert_same(flat(infers.forward(layers[k])), wants[k][:3])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_weights_that_another_thread_writes_to():
    layer, kept = layer_of((1, 4, 64, 64)), {}
    plan, weights = numba.plan(layer, False, kept, ()), [layer.weights[1].clone() * k for k in range(3)]

    def write(_):
        for k in range(300):
            layer.weights[1].copy_(weights[k % 3])

    with ThreadPoolExecutor(3) as pool:
        writing = pool.submit(write, 0)
        while not writing.done():
            plan.forward(layer)
    for each in weights:
        layer.weights[1].copy_(each)
        assert_same(flat(plan.forward(layer)), flat(numba.forward(layer, False)))


@pytest.mark.parametrize("kept", [None, {}])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(1, 1, 7, 100), (5, 7, 100, 33), (9, 40, 1, 16)])
def test_sixteen_bits(size, dtype, masks, kept, poisoned):
    """They are computed in float32, and rounded once."""
    layer, kept = layer_of(size, dtype, masks=masks), kept if kept is None else {}
    layer = layer._replace(x=layer.x.transpose(0, 1).contiguous().transpose(0, 1))
    wide = cast(layer, torch.float32)
    run = numba.forward(wide, True)
    want = flat(run, numba.backward(cast(gradients_of(run, dtype), torch.float32), wide, run, ALL))
    plan = numba.plan(layer, True, kept, ())
    for _ in range(2):
        got = called(layer, plan=plan)
        assert all(a.dtype is dtype for a in got)
        assert_same(got, [a.to(dtype) for a in want])
        assert_same(flat(numba.plan(layer, False, kept, ()).forward(layer)), got[:3])


@pytest.mark.parametrize("size", [(1, 1, 7, 100), (5, 7, 100, 33)])
def test_weights_that_autocast_would_cast(size):
    weights = layer_of(size).weights
    layer, kept = layer_of(size, torch.bfloat16)._replace(weights=weights), {}
    for change in range(3):
        if change:
            weights[change].data.view(-1)[-1] += 1e-3  # less than what a rounding may hide
        want = flat(numba.plan(cast(layer, torch.bfloat16), False, None, ()).forward(cast(layer, torch.bfloat16)))
        for each in (None, kept):
            got = flat(numba.plan(layer, False, each, ()).forward(layer))
            assert all(a.dtype is torch.bfloat16 for a in got)
            assert_same(got, want)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("G", [1, 3])
def test_stacks(G, reverse, masks):
    """Each layer of a stack is one that runs alone, also where all read the same x."""
    layer = layer_of((5, 4 * G, 7, 33), masks=masks, reverse=reverse, stack=(G,))
    assert_close(called(layer, {}), true(layer), torch.float32)
    shared = layer_of((5, 4, 7, 33), reverse=reverse).x
    layer = layer._replace(x=shared.unsqueeze(1).expand(5, G, 4, 7))
    run = numba.forward(layer, True)
    got = numba.backward(gradients_of(run), layer, run, ALL)
    alone = layer._replace(x=shared.repeat(1, G, 1))
    run_alone = numba.forward(alone, True)
    want = numba.backward(gradients_of(run), alone, run_alone, ALL)
    assert_same(flat(run, got), flat(run_alone, want))


@pytest.mark.parametrize("missing", [(2,), (3,), (2, 3)])
@pytest.mark.parametrize("T", [1, 6])
def test_absent_biases_and_states(T, missing):
    layer, kept = layer_of((T, 3, 7, 33), states=False), {}
    layer = layer._replace(weights=(*(None if n in missing else a for n, a in enumerate(layer.weights)),))
    needs = Gradients(True, (True, True, *(n not in missing for n in (2, 3))), (True, True))
    plan = numba.plan(layer, True, kept, ())
    wide = cast(layer, torch.float64)
    want = reference.forward(wide, True)
    want = flat(want, reference.backward(cast(gradients_of(want), torch.float64), wide, want, needs))
    for _ in range(2):
        run = plan.forward(layer)
        assert_close(flat(run, plan.backward(gradients_of(run), layer, run, needs)), want, torch.float32)


PRECISIONS = [name for name, pieces in numba.COMPONENTS.items() if pieces <= numba.max_components()]


@pytest.mark.parametrize("module", [numba, *map(numba.with_precision, PRECISIONS)], ids=["float32", *PRECISIONS])
@pytest.mark.parametrize("n", range(7))
def test_one_gradient_alone(n, module):
    """Also where it is the first that packs weights to keep them, of which it may not read all."""
    for size in ((1, 5, 40, 33), (1, 7, 40, 1), (6, 5, 40, 33), (1, 3, 650, 100)):
        layer, kept = layer_of(size), {}
        plan = module.plan(layer, True, kept, ())
        run = plan.forward(layer)
        got = plan.backward(gradients_of(run), layer, run, Gradients.of(cells.lstm, [k == n for k in range(7)])).flat
        want = plan.backward(gradients_of(run), layer, run, ALL).flat
        assert torch.equal(got[n], want[n])
        assert all(a is None for k, a in enumerate(got) if k != n)


def test_no_rows():
    layer = layer_of((3, 0, 7, 33))
    assert called(layer, {})[0].shape == (3, 0, 33)


@pytest.mark.skipif(
    numba.max_components() < 3, reason="the processor has no matrix unit that takes pieces of a float32"
)
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("kept", [None, {}])
def test_numbers_that_the_matrix_unit_cannot_take(kept, where):
    layer = layer_of((2, 3, 650, 120))
    changed = layer.x if where == "x" else layer.weights[0]
    changed.view(-1)[0] = 1e20
    kept = kept if kept is None else {}
    plan = numba.plan(layer, False, kept, ())
    for _ in range(2):
        assert_close(flat(plan.forward(layer)), true(layer)[:3], torch.float32)


@pytest.mark.skipif(numba.max_components() < 1, reason="the processor has no fast products of bfloat16")
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("T", [1, 5])
def test_bfloat16_as_it_is(T, masks):
    """The backend of one piece takes bfloat16 without widening it, and weights of float32 are rounded to it."""
    module, layer, kept = numba.with_precision("bf16"), layer_of((T, 20, 33, 40), torch.bfloat16, masks=masks), {}
    for each in (None, kept, kept):
        got = called(layer, each, module=module)
        assert all(a.dtype is torch.bfloat16 for a in got)
        for k, (a, b) in enumerate(zip(got, true(layer))):
            assert error(a, b) < 2e-2, k  # products of numbers of 8 bits, and h is one of them at every step
        infers = flat(module.plan(layer, False, each, ()).forward(layer))
        assert_same(infers, got[:3])
        wide = layer._replace(weights=cast(layer, torch.float32).weights)
        assert_same(flat(module.plan(wide, False, each, ()).forward(wide)), infers)
