"""Layers of a cell that has no product of x: the values of x come as inputs, and ``input`` is None."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import fastlstm
from fastlstm import cells
from tests.helpers.modules import assert_same_gradients, randn
from tests.helpers.rnn import RNN, given, loop, without_x
from tests.helpers.tolerances import close
from tests.helpers.transforms import exporting

of_both = pytest.mark.parametrize("backend", ["numba", "reference"])


@cells.cell(gates={}, states=("h",), params=("u",), inputs=("x",))
def diagonal(h, u, x):
    """No product at all."""
    return cells.tanh(x + u * h)


def values(*size):
    """Two inputs that are views of one tensor, as a product with several blocks of rows gives them."""
    return dict(zip(without_x.inputs, randn(*size[:-1], 2 * size[-1], grad=False).chunk(2, -1)))


@of_both
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"bias": False, "heads": 3}], ids=str)
@pytest.mark.parametrize("cell", [without_x, diagonal], ids=lambda cell: cell.name)
def test_equals_a_loop(poisoned, cell, options, backend):
    options = options if cell is without_x else {**options, "heads": 1}
    rnn = RNN(cell, 0, 6, backend=backend, **options)
    _, states, inputs = given(rnn)
    masks = {"lengths": torch.tensor([6, 0, 3, 5])}
    if not rnn.bidirectional:
        masks["reset"] = torch.rand(6, 4) < 0.3
    for chosen in ({}, masks):
        expected, ends = loop(rnn, None, states, inputs, **chosen)
        output, last, every = rnn(None, states, inputs, **chosen, return_states=True)
        assert_same_gradients(rnn, rnn, [output, *every[1:], *last], [*expected, *ends], [*states, *inputs.values()])
        with torch.no_grad():
            close(rnn(None, states, inputs, **chosen)[0], expected[0], "sums")


def test_parameters():
    rnn = fastlstm.RNN(without_x, 0, 6, heads=3)
    assert repr(rnn) == "fastlstm.RNN(without_x, 0, 6, heads=3)"
    shapes = {name: tuple(a.shape) for name, a in rnn.state_dict().items()}
    assert shapes == {"weight_hh_l0": (12, 2), "bias_hh_l0": (12,), "p_l0": (6,)}
    assert list(fastlstm.RNN(without_x, 0, 6, bias=False).state_dict()) == ["weight_hh_l0", "p_l0"]
    assert list(fastlstm.RNN(diagonal, 0, 6).state_dict()) == ["u_l0"]


@of_both
def test_calls_of_every_kind(backend):
    rnn, inputs = RNN(without_x, 0, 6, backend=backend), values(5, 4, 6)
    output, last = rnn(None, inputs=inputs)
    stream, state = rnn.stream(4), None
    for t, h in enumerate(output):
        now = {name: a[t] for name, a in inputs.items()}
        h_t, state = rnn.step(None, state, now)
        close([h_t, stream(None, now)], [h, h], "values")
    close([state, stream.state], [last, last], "values")
    close(rnn.step(None, None, {name: a[0, 1] for name, a in inputs.items()})[0], output[0, 1], "values")
    close(rnn(None, inputs={name: a[:, 1] for name, a in inputs.items()})[0], output[:, 1], "values")
    close(rnn(output[..., :0], inputs=inputs)[0], output, "values")  # an input of no features is one
    rnn.batch_first = True
    turned = {name: a.transpose(0, 1) for name, a in inputs.items()}
    close(rnn(None, inputs=turned)[0].transpose(0, 1), output, "values")


@of_both
def test_sizes_of_1_and_0(backend):
    rnn, inputs = RNN(without_x, 0, 6, backend=backend), values(5, 4, 6)
    for name, size in (("x_a", (1, 4, 6)), ("x_b", (5, 1, 1)), ("x_a", (1, 1, 1))):
        small = randn(*size)
        got, want = (rnn(None, inputs=inputs | {name: a})[0] for a in (small, small.expand(5, 4, 6)))
        close(got, want, "values")
    assert rnn(None, inputs=values(1, 1, 6))[0].shape == (1, 1, 6)
    for T, B in ((0, 4), (5, 0)):
        output, (h_n, _) = rnn(None, inputs=values(T, B, 6))
        assert (output.shape, h_n.shape) == ((T, B, 6), (1, B, 6))


def test_inputs_of_any_strides_are_not_copied():
    rnn, whole = fastlstm.RNN(without_x, 0, 64, heads=4, backend="numba"), torch.randn(64, 2, 50, 64)
    inputs = dict(zip(without_x.inputs, whole.transpose(0, 2).unbind(1)))  # (T, B, H), whose steps are closer than rows
    want, _ = rnn(None, inputs={name: a.contiguous() for name, a in inputs.items()})
    rnn(None, inputs=inputs)  # which packs the weights
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        got, _ = rnn(None, inputs=inputs)
    assert torch.equal(got, want)
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}


@of_both
def test_recompute(backend):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        rnn, inputs = RNN(without_x, 0, 6, backend=backend, recompute=recompute), values(300, 2, 6)
        inputs = {name: a.detach().requires_grad_() for name, a in inputs.items()}
        output, _ = rnn(None, inputs=inputs)
        results.append([output, *torch.autograd.grad(output.sum(), [*inputs.values(), *rnn.parameters()])])
    close(results[1], results[0], "gradients")


@of_both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_and_autocast(backend, dtype):
    exact = RNN(without_x, 0, 6)
    rnn, inputs = fastlstm.RNN(without_x, 0, 6, backend=backend), values(5, 4, 6)
    rnn.load_state_dict(exact.state_dict())
    want, _ = exact(None, inputs=inputs)
    for training in (False, True):
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(training):
            close(rnn(None, inputs={name: a.float() for name, a in inputs.items()})[0], want, "cast")
    close(rnn.to(dtype)(None, inputs={name: a.to(dtype) for name, a in inputs.items()})[0], want, "cast")


@of_both
def test_transforms(backend):
    rnn = RNN(without_x, 0, 4, heads=2, backend=backend)
    weights, inputs = dict(rnn.named_parameters()), values(3, 2, 4)

    def run(weights, inputs):
        return functional_call(rnn, weights, (None, None, inputs))[0]

    def loss(weights, inputs):
        return run(weights, inputs).square().sum()

    models = [{name: torch.randn_like(a) for name, a in weights.items()} for _ in range(3)]
    batches = [values(3, 2, 4) for _ in range(3)]
    many_models, many_batches = (
        {name: torch.stack([each[name] for each in several]) for name in several[0]} for several in (models, batches)
    )
    for dims, arguments in (
        ((0, 0), (many_models, many_batches)),
        ((0, None), (many_models, inputs)),
        ((None, 0), (models[0], many_batches)),
    ):
        got, d_got = vmap(run, dims)(*arguments), vmap(grad(loss, (0, 1)), dims)(*arguments)
        for k in range(3):
            pair = models[k if dims[0] == 0 else 0], batches[k] if dims[1] == 0 else inputs
            close(got[k], run(*pair), "sums")
            for found, want in zip(d_got, grad(loss, (0, 1))(*pair)):
                close([found[name][k] for name in want], [want[name] for name in want], "gradients")
    tangent = {name: torch.randn_like(a) for name, a in inputs.items()}
    got, step = jvp(lambda inputs: run(weights, inputs), (inputs,), (tangent,))[1], 1e-6
    ahead, behind = ({name: a + by * tangent[name] for name, a in inputs.items()} for by in (step, -step))
    difference = (run(weights, ahead) - run(weights, behind)) / (2 * step)
    assert (got - difference).abs().max() < 1e-8  # the error of a difference of such a step

    def flat(*tensors):
        return run(dict(zip(weights, tensors)), dict(zip(inputs, tensors[len(weights) :])))

    operands = [a.detach().contiguous().requires_grad_() for a in (*weights.values(), *inputs.values())]
    assert torch.autograd.gradcheck(flat, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(flat, operands)


@of_both
def test_compiled_and_exported(backend):
    rnn, inputs = RNN(without_x, 0, 6, backend=backend), {name: a.contiguous() for name, a in values(5, 4, 6).items()}
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    sizes = {0: torch.export.Dim("T", max=99), 1: torch.export.Dim("B", max=99)}
    shapes = {"input": None, "states": None, "inputs": dict.fromkeys(inputs, sizes)}
    with exporting():
        program = torch.export.export(rnn, (None, None, inputs), dynamic_shapes=shapes)
    for T, B in ((5, 4), (7, 2)):
        inputs = {name: a.contiguous() for name, a in values(T, B, 6).items()}
        want = rnn(None, None, inputs)[0]
        close([f(None, None, inputs)[0] for f in (compiled, program.module())], [want, want], "values")
        gradients = [
            torch.autograd.grad(f(None, None, inputs)[0].sum(), list(rnn.parameters())) for f in (compiled, rnn)
        ]
        close(*gradients, "gradients")
