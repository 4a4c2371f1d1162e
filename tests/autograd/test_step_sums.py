"""Gradients of weights are summed over a loop's steps as the backward pass runs, and nothing else may notice: every use
of autograd beside `torch.nn`, whose steps each return gradients of their own. The numbers are float64.
"""

import contextlib
import copy
import gc
import itertools
import pickle
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import fastlstm
from tests.helpers.cases import DRAWS, cases, jumps, largest_error
from tests.helpers.threads import at_once, split, splits
from tests.helpers.tolerances import F32, F64

KINDS = {"LSTM": (fastlstm.LSTMCell, nn.LSTMCell), "GRU": (fastlstm.GRUCell, nn.GRUCell)}
KINDS["Elman"] = fastlstm.ElmanCell, nn.RNNCell
ROWS, WIDTH, UNITS = 3, 5, 8
# Of the largest value of a tensor, or of one: a hundred roundings of float64. Norms of some cells multiply errors by
# ten over dozens of steps: a thousand roundings of either type.
BOUND, BOUNDS = 2.3e-14, {F64: 4.6e-13, F32: 2.4e-4}


def h_of(state):
    return state[0] if isinstance(state, tuple) else state


def steps(cell, xs, state=None):
    """The outputs of some steps, and the last state."""
    outputs = []
    for x in xs:
        state = cell(x, state)
        outputs.append(h_of(state))
    return outputs, state


def total(outputs):
    return torch.stack(outputs).pow(2).sum()


def gradients(cell, *others):
    return [a.grad for a in (*cell.parameters(), *others)]


def state_of(cell, h):
    return (h, 2 * h) if "LSTM" in type(cell).__name__ else h


def all_steps(cell, xs):
    total(steps(cell, xs)[0]).backward()
    return gradients(cell, xs)


def some_steps(cell, xs):
    outputs, state = steps(cell, xs)
    (outputs[2].sum() + (state[1] if isinstance(state, tuple) else state).pow(3).sum()).backward()
    return gradients(cell, xs)


def retained(cell, xs):
    loss = total(steps(cell, xs)[0])
    for _ in range(3):
        loss.backward(retain_graph=True)
    return gradients(cell, xs)


def losses_in_turns(cell, xs):
    outputs, _ = steps(cell, xs)
    outputs[1].sum().backward(retain_graph=True)
    torch.autograd.backward([outputs[4].sum(), outputs[5].pow(2).sum()])
    return gradients(cell, xs)


def loops_at_once(cell, xs):
    one, other = steps(cell, xs)[0], steps(cell, 2 * xs)[0]
    other[-1].pow(2).sum().backward()
    one[-1].sum().backward()
    return gradients(cell, xs)


def wanted_alone(cell, xs):
    """Gradients of some tensors, none of which may be computed for the others."""
    h = torch.zeros(ROWS, UNITS, dtype=F64, requires_grad=True)
    outputs, _ = steps(cell, xs, state_of(cell, h))
    operands = [xs, h, cell.weight_ih, cell.weight_hh, cell.bias_hh, outputs[2]]
    results = []
    for count in (1, 2, len(operands)):
        for wanted in itertools.combinations(operands, count):
            results += torch.autograd.grad(total(outputs), wanted, retain_graph=True)
    total(outputs).backward(inputs=[cell.bias_ih, xs])
    return results + gradients(cell, xs, h)


def second_derivatives(cell, xs):
    loss = total(steps(cell, xs)[0])
    first = torch.autograd.grad(loss, [xs, *cell.parameters()], create_graph=True)
    (loss + sum(a.pow(2).sum() for a in first)).backward(retain_graph=True)
    return [*first, *gradients(cell, xs), *torch.autograd.grad(loss, [*cell.parameters()])]


def second_derivatives_in_place(cell, xs):
    total(steps(cell, xs)[0]).backward(create_graph=True)
    first = gradients(cell)
    cell.zero_grad()
    sum(a.pow(2).sum() for a in first).backward()
    result = gradients(cell, xs)
    cell.zero_grad()  # PyTorch warns of a cycle from a gradient to its graph
    return result


def batched_gradients(cell, xs):
    h, wanted = steps(cell, xs)[0][-1].sum(0), [xs, *cell.parameters()]
    directions = torch.eye(UNITS, dtype=F64)
    rows = torch.autograd.grad(h, wanted, directions, is_grads_batched=True, retain_graph=True)
    return [*rows, *torch.autograd.grad(h.sum(), wanted)]


def hooks_of_parameters(cell, xs):
    calls = []
    for k, a in enumerate(cell.parameters()):
        a.register_hook(lambda g, k=k: (calls.append(k), 2 * g)[1])
        a.register_post_accumulate_grad_hook(lambda a: calls.append(9))
    outputs, _ = steps(cell, xs)
    cell.weight_hh.register_hook(lambda g: 3 * g)
    total(outputs).backward()
    return [*gradients(cell, xs), torch.tensor(sorted(calls), dtype=F64)]


def optimizer_in_backward(cell, xs):
    def step(a):
        with torch.no_grad():
            a.sub_(0.1 * a.grad)
        a.grad = None

    for a in cell.parameters():
        a.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        total(steps(cell, xs)[0]).backward()
    return [a.detach() for a in cell.parameters()]


def truncated(cell, xs):
    optimizer, state = torch.optim.SGD(cell.parameters(), 0.1, momentum=0.9), None
    for _ in range(4):
        outputs, state = steps(cell, xs, state)
        optimizer.zero_grad()
        total(outputs).backward()
        optimizer.step()
        state = tuple(a.detach() for a in state) if isinstance(state, tuple) else state.detach()
    return [a.detach() for a in cell.parameters()]


def frozen(cell, xs):
    results = []
    for names in (["bias_ih"], ["weight_hh"], ["weight_ih", "bias_hh"], [n for n, _ in cell.named_parameters()]):
        for name, a in cell.named_parameters():
            a.requires_grad_(name not in names)
        cell.zero_grad()
        xs.grad = None
        results += all_steps(cell, xs)
    return results


def toggled(cell, xs):
    state = cell(xs[0])
    for k, x in enumerate(xs[1:]):
        cell.weight_hh.requires_grad_(k % 2 == 1)
        state = cell(x, state)
        with torch.no_grad():
            cell(x, state)
    h_of(state).pow(2).sum().backward()
    return gradients(cell, xs)


def functional(cell, xs):
    """Two sets of weights in turns, and weights that a network makes."""
    sets = [{n: (k * a.detach()).requires_grad_() for n, a in cell.named_parameters()} for k in (1, 2)]
    scale = torch.ones((), dtype=F64, requires_grad=True)
    state = None
    for k, x in enumerate(xs):
        state = functional_call(cell, sets[k % 2], (x, state))
        state = functional_call(cell, {n: scale * a for n, a in cell.named_parameters()}, (x, state))
    h_of(state).pow(2).sum().backward()
    return [scale.grad, *[a.grad for each in sets for a in each.values()], *gradients(cell)]


def written_parameters(cell, xs):
    """A network writes into the Parameters, while the graph of the weights before is there."""
    base, graphs = [a.detach().clone() for a in cell.parameters()], []
    cell.requires_grad_(False)
    scales = [torch.tensor(value, dtype=F64, requires_grad=True) for value in (1.0, 1.1)]
    for scale in scales:
        for a, value in zip(cell.parameters(), base):
            a.detach_().copy_(value * scale)
        graphs.append(steps(cell, xs)[0])
        total(graphs[-1]).backward(retain_graph=True)
    return [scale.grad for scale in scales]


def written_before_a_pass(cell, xs):
    """A network writes into the Parameters again before the first graph has had its pass, which it never has."""
    cell.requires_grad_(False)
    scales = [torch.tensor(value, dtype=F64, requires_grad=True) for value in (1.1, 0.9)]
    graphs = []
    for scale in scales:
        for a in cell.parameters():
            a.detach_().mul_(scale)
        graphs.append(steps(cell, xs)[0])
    total(graphs[-1]).backward()
    assert scales[0].grad is None
    return [scales[1].grad]


def other_type_in_a_graph(cell, xs):
    """The Parameters get data of another type between two steps of one graph."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda a: a):
        one, _ = steps(cell, xs[:3])
        for a in cell.parameters():
            a.data = a.data.float()
        other, _ = steps(cell, xs[3:].float())
    for a in cell.parameters():
        a.data = a.data.double()
    (total(one) + total(other)).backward()
    return gradients(cell, xs)


def inner_loop(cell, xs):
    """The gradient through a step of gradient descent."""
    weights = dict(cell.named_parameters())
    first = torch.autograd.grad(total(steps(cell, xs)[0]), [*weights.values()], create_graph=True)
    fast, state = {n: a - 0.01 * g for (n, a), g in zip(weights.items(), first)}, None
    for x in xs:
        state = functional_call(cell, fast, (x, state))
    h_of(state).pow(2).sum().backward()
    return gradients(cell, xs)


def tied(cell, xs):
    twin, state = copy.deepcopy(cell), None
    for name, a in cell.named_parameters():
        setattr(twin, name, a)
    for k, x in enumerate(xs):
        state = (cell, twin)[k % 2](x, state)
    h_of(state).pow(2).sum().backward()
    return gradients(cell, xs)


def parametrized(cell, xs):
    cell = copy.deepcopy(cell)
    nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    total(steps(cell, xs)[0]).backward()
    with nn.utils.parametrize.cached():
        total(steps(cell, xs)[0]).backward()
    return gradients(cell, xs)


def checkpointed(cell, xs, use_reentrant):
    h = h_of(cell(xs[0]))
    for k in (1, 3):
        part = lambda h, *xs: h_of(steps(cell, xs, state_of(cell, h))[1])  # noqa: E731
        h = checkpoint(part, h, xs[k], xs[k + 1], use_reentrant=use_reentrant)
    h_of(cell(xs[5], state_of(cell, h))).pow(2).sum().backward()
    return gradients(cell, xs)


def saved_elsewhere(cell, xs):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda a: a):
        outputs, _ = steps(cell, xs)
    total(outputs).backward()
    return gradients(cell, xs)


def raising(cell, xs):
    """A hook raises in the middle of a pass, and a later pass has nothing of it."""
    outputs, _ = steps(cell, xs)
    hook = outputs[2].register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        total(outputs).backward(retain_graph=True)
    hook.remove()
    cell.zero_grad()
    xs.grad = None
    total(outputs).backward()
    return gradients(cell, xs)


def anomalies_detected(cell, xs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly(check_nan=True):
            return all_steps(cell, xs)


class _OtherPass(torch.autograd.Function):
    """Its backward pass takes steps of a cell, and runs backward passes for these."""

    @staticmethod
    def forward(ctx, h, cell, x):
        ctx.cell, ctx.x = cell, x
        ctx.save_for_backward(h)
        return h.clone()

    @staticmethod
    def backward(ctx, g):
        with torch.enable_grad():
            h = ctx.saved_tensors[0].detach().requires_grad_()
            state = steps(ctx.cell, [ctx.x, ctx.x], state_of(ctx.cell, h))[1]
            of_h, of_w = torch.autograd.grad(h_of(state).pow(2).sum(), [h, ctx.cell.weight_hh])
            total(steps(ctx.cell, [ctx.x, ctx.x])[0]).backward()
        return g + of_h + of_w.sum(), None, None


class _Nothing(torch.autograd.Function):
    """Its gradient is undefined."""

    @staticmethod
    def forward(ctx, a):
        return a.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("options", [{}, {"return_cells": True}], ids=["by a plan", "without a plan"])
def test_layers_have_no_gradient_where_none_comes_in(options):
    layer = fastlstm.LSTM(3, 4, backend="numba")
    output, *_ = layer(torch.randn(5, 2, 3), **options)
    _Nothing.apply(output).sum().backward()
    assert all(a.grad is None for a in layer.parameters())


def nothing_comes_in(cell, xs):
    _Nothing.apply(steps(cell, xs)[0][-1]).sum().backward()
    return gradients(cell, xs)


def written_within_a_pass(cell, xs):
    """A hook writes to the weights, which no version counts, so that kernels multiply by kept copies and run again."""
    with split(1, 2):  # one thread alone ends before it writes, where weights have changed
        outputs, _ = steps(cell, xs)
        outputs[3].register_hook(lambda _: (cell.weight_hh.data.mul_(1.5), None)[1])
        total(outputs).backward()
    return gradients(cell, xs)


def pass_inside_a_pass(cell, xs):
    h = h_of(steps(cell, xs[:3])[1])
    h = _OtherPass.apply(h, cell, xs[5].detach())
    total(steps(cell, xs[3:], state_of(cell, h))[0]).backward()
    return gradients(cell, xs)


def of_transforms(cell, xs):
    weights = {n: a.detach() for n, a in cell.named_parameters()}

    def loss(weights, state=None):
        for x in xs.detach():
            state = functional_call(cell, weights, (x, state))
        return h_of(state).pow(2).sum()

    return [*grad(loss)(weights).values()]


def of_many_shapes(cell, xs):
    """A batch that shrinks, unbatched steps, rows that are strided or one row, and states that are masked."""
    h = torch.linspace(-1, 1, UNITS, dtype=F64).repeat(ROWS, 1)
    loss, state = 0.0, state_of(cell, h)
    for rows in (3, 2, 1):
        state = tuple(a[:rows] for a in state) if isinstance(state, tuple) else state[:rows]
        state = cell(xs[rows, :rows], state)
        loss = loss + h_of(state).pow(2).sum()
    state = cell(xs[0, 0], cell(xs[1, 0]))
    strided = cell(xs[:3, 0, :].flip(0), cell(xs[2, :1].expand(ROWS, WIDTH)))
    masked = cell(xs[3], cell(xs[4], state_of(cell, h * torch.tensor([[1.0], [0.0], [1.0]], dtype=F64))))
    (loss + h_of(state).sum() + h_of(strided).pow(2).sum() + h_of(masked).sum()).backward()
    return gradients(cell, xs)


def of_many_rows(cell, xs):
    total(steps(cell, xs.repeat(1, 70, 1))[0]).backward()
    return gradients(cell, xs)


def fed_back(cell, xs):
    x, state = xs[0], None
    for _ in range(6):
        state = cell(x, state)
        x = torch.tanh(h_of(state)[:, :WIDTH])
    x.pow(2).sum().backward()
    return gradients(cell, xs)


def of_threads(cell, xs):
    """Threads that each make graphs, and threads that share one."""
    shared, wanted, results = total(steps(cell, xs)[0]), [*cell.parameters()], [[]] * 4

    def work(k):
        for _ in range(5):
            loss = shared if k % 2 else total(steps(cell, (k + 1) * xs.detach())[0])
            results[k] = torch.autograd.grad(loss, wanted, retain_graph=True)

    at_once(*[lambda k=k: work(k) for k in range(4)])
    return [a for each in results for a in each]


def copied(cell, xs):
    """Copies of a cell, made while a graph of it is there."""
    outputs, _ = steps(cell, xs)
    others = pickle.loads(pickle.dumps(cell)), copy.deepcopy(cell)
    for other in others:
        total(steps(other, xs)[0]).backward()
    total(outputs).backward()
    return [a for each in (cell, *others) for a in gradients(each)]


def converted(cell, xs, swaps):
    """A module changes its type after a pass. `swaps`: whether its Parameters are replaced in place."""
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        total(steps(cell, xs)[0]).backward()
        cell.zero_grad()
        cell.to(F32).to(F64)
        return all_steps(cell, xs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


USES = [
    all_steps, some_steps, retained, losses_in_turns, loops_at_once, wanted_alone, second_derivatives,
    second_derivatives_in_place, batched_gradients, hooks_of_parameters, optimizer_in_backward, truncated, frozen,
    toggled, functional, written_parameters, written_before_a_pass, inner_loop, tied, parametrized, saved_elsewhere,
    raising, anomalies_detected, nothing_comes_in, written_within_a_pass, pass_inside_a_pass, of_transforms,
    of_many_shapes, of_many_rows, fed_back, of_threads, copied,
]  # fmt: skip
USES = {use.__name__: use for use in USES}
for flag in (False, True):
    USES[f"checkpointed, reentrant {flag}"] = lambda cell, xs, flag=flag: checkpointed(cell, xs, flag)
    USES[f"converted, swaps {flag}"] = lambda cell, xs, flag=flag: converted(cell, xs, flag)


def pair(kind, dtype=F64):
    """A cell that has seen a loop, after which its steps share sums, and torch's with the same weights."""
    ours, theirs = KINDS[kind]
    ours, theirs = ours(WIDTH, UNITS, dtype=dtype, backend="numba"), theirs(WIDTH, UNITS, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    total(steps(ours, torch.randn(6, ROWS, WIDTH, dtype=dtype))[0]).backward()
    ours.zero_grad()
    return ours, theirs


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_no_use_of_autograd_notices(kind, use):
    xs, results = torch.randn(6, ROWS, WIDTH, dtype=F64), []
    for cell in pair(kind):
        results.append(USES[use](cell, xs.clone().requires_grad_()))
    ours, theirs = results
    assert [a is None for a in ours] == [a is None for a in theirs]
    present = [[a for a in each if a is not None] for each in results]
    assert [a.shape for a in present[0]] == [a.shape for a in present[1]]
    assert largest_error(*present) < 10 * BOUND  # some uses sum the gradients of several passes


@settings(max_examples=100, **DRAWS)
@given(data=st.data(), threads=splits)
def test_a_loop_has_the_gradients_of_its_sequence(data, threads, poisoned):
    """For any cell, any number of rows and units, and any threads."""
    plain = {"bidirectional": st.just(False), "every": st.just(False), "mask": st.just("")}
    case = data.draw(cases("numba", **plain).filter(lambda case: case.T > 1))
    if case.dtype is F32 and jumps(case.cell):
        return  # a rounding may change the truth

    def loop(x, state, inputs=None):
        outputs = []
        for t in range(case.T):
            options = {} if inputs is None else {"inputs": {name: a[t] for name, a in inputs.items()}}
            output, state = case.module.step(None if x is None else x[t], state, **options)
            outputs.append(output)
        return torch.stack(outputs), state

    with split(*threads):
        for _ in range(2):  # the first loop tells that there is one
            got = case.results(run=loop)
    for results, truth in zip(got, case.results(case.exact)):
        assert largest_error(results, truth) < BOUNDS[case.dtype]


def test_steps_add_no_gradients_that_they_wrote():
    """torch adds two gradients of the weights at each step but one; ours at none."""
    added = []
    for cell in pair("LSTM"):
        outputs, _ = steps(cell, torch.randn(6, ROWS, WIDTH, dtype=F64))
        loss = total(outputs)
        with torch.profiler.profile(record_shapes=True) as profile:
            loss.backward()
        shapes = [e.input_shapes[:1] for e in profile.events() if e.name in ("aten::add", "aten::add_")]
        added.append(shapes.count([[4 * UNITS, UNITS]]))
    assert added == [0, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_two_types_in_one_graph(kind):
    xs = torch.randn(6, ROWS, WIDTH, dtype=F64)
    results = [other_type_in_a_graph(cell, xs.clone().requires_grad_()) for cell in pair(kind)]
    assert largest_error(*results) < BOUNDS[F32]


def test_a_weight_written_between_steps_raises():
    cell, _ = pair("LSTM")
    state = cell(torch.randn(ROWS, WIDTH, dtype=F64))
    with torch.no_grad():
        cell.weight_hh.mul_(0.5)
    state = cell(torch.randn(ROWS, WIDTH, dtype=F64), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h_of(state).sum().backward()


def test_a_second_pass_without_its_graph_raises():
    cell, _ = pair("GRU")
    loss = total(steps(cell, torch.randn(6, ROWS, WIDTH, dtype=F64))[0])
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("ends", ["a pass", "no pass", "a failure", "a failure with create_graph"])
def test_graphs_leave_nothing_behind(ends):
    """The nodes of a loop go with its outputs, while the collector of cycles is off."""
    cell, _ = pair("LSTM")
    gc.disable()
    try:
        outputs, state = steps(cell, torch.randn(6, ROWS, WIDTH, dtype=F64))
        nodes = [weakref.ref(a.grad_fn) for a in outputs]
        of_weights = next(node for node, _ in outputs[0].grad_fn.next_functions if node is not None)
        nodes.append(weakref.ref(of_weights))
        if "failure" in ends:
            outputs[2].register_hook(lambda g: 1 / 0)
        if ends != "no pass":
            with contextlib.suppress(ZeroDivisionError):
                outputs[-1].sum().backward(create_graph="create_graph" in ends)
        del outputs, state, of_weights
        assert [node() for node in nodes] == [None] * len(nodes)
    finally:
        gc.enable()


def test_compiled_autograd():
    """Passes that add to gradients that are there, and passes for some tensors only."""
    xs, results = torch.randn(6, ROWS, WIDTH, dtype=F64, requires_grad=True), []
    for cell in pair("LSTM"):
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            for count in (6, 6, 4):
                loss = total(steps(cell, xs[:count])[0])
                some = [torch.autograd.grad(loss, a, retain_graph=True)[0] for a in (xs, cell.weight_hh)]
                loss.backward(inputs=[*cell.parameters()])
        results.append([*some, *gradients(cell)])
    assert largest_error(*results) < BOUND
