"""Every call computes with the weights as they are, whoever has written to them since the last one, and how.

Calls without gradients keep packed copies of the weights. Each test calls a module, writes to its weights, and calls it
again. The answer must be, bit for bit, that of a new module which is given clones of the weights as they are now. It
must also differ from the answer before the write: otherwise the test could not fail.
"""

import copy
import dataclasses
import math
import pickle
from contextlib import nullcontext
from operator import setitem

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, prune, vector_to_parameters

from tests.helpers.cases import DRAWS, cases
from tests.helpers.layers import needs_native
from tests.helpers.numba import needs_pieces
from tests.helpers.threads import on_any_split, splits
from tests.helpers.tolerances import BF16, F16, F32, F64

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
each_backend = pytest.mark.parametrize(
    "backend", ["numba", pytest.param("native", marks=needs_native), pytest.param("numba-bf16x3", marks=needs_pieces)]
)
SIZES = st.sampled_from([1, 2, 7, 16, 33, 100])
# T, B, I and H; and weights of more than a megabyte
sizes = st.tuples(st.sampled_from([1, 2, 9]), st.sampled_from([1, 3, 40]), SIZES, SIZES | st.just(150))
sizes |= st.sampled_from([(2, 1, 60, 272), (4, 2, 60, 260), (2, 40, 17, 528)])


def same(got, want):
    """Whether these are the same numbers, where a NaN is the same as another."""
    pairs = zip(got, want, strict=True)
    return all(a.dtype is b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs)


def random_like(p):
    return torch.randn(p.shape).to(p.dtype)


def set_back(m, n):
    """A write that torch's counter does not count."""
    p = getattr(m, n)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
        p.view(-1)[-1] += 1


def through_numpy(m, n):
    w = getattr(m, n).detach()
    torch.from_numpy(w.view(BITS[w.itemsize]).numpy()).view(w.dtype).view(-1)[-1] += 1


def swap_rows(m, n):
    w = getattr(m, n).data
    w[[0, -1]] = w[[-1, 0]].clone()


def opposite_biases(m, n):
    """Their sum changes by roundings alone."""
    *_, p, q = m.parameters()
    p.data.add_(1000)
    q.data.sub_(1000)


def plain_tensor(m, n):
    new = random_like(getattr(m, n))
    delattr(m, n)
    setattr(m, n, new)


def in_a_flat_buffer(m, n):
    """As some optimizers hold them. What is written to it later counts for no parameter."""
    flat, start = torch.cat([p.detach().flatten() for p in m.parameters()]), 0
    for p in m.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return flat


def another_dtype(m, n):
    """There and back, and a write on the way."""
    before = getattr(m, n).dtype
    m.to(torch.float32 if before is torch.float64 else torch.float64)
    getattr(m, n).data.mul_(1.5)
    m.to(before)


def fused_step(m, n):
    for p in m.parameters():
        p.grad = torch.zeros_like(p)
    getattr(m, n).grad.view(-1)[-1] = 1
    torch.optim.Adam(m.parameters(), lr=0.5, eps=1e-3, fused=True).step()


def copied(m, n):
    new = pickle.loads(pickle.dumps(copy.deepcopy(m)))
    getattr(new, n).data.view(-1)[0] += 1
    return new


WRITES = {  # of a module and the name of a weight; what they return is called from then on, if it is a module
    "element": lambda m, n: getattr(m, n).data.view(-1)[0].add_(1),
    "last element": lambda m, n: getattr(m, n).data.view(-1)[-1].sub_(1),
    "all": lambda m, n: torch.no_grad()(getattr(m, n).add_)(0.5),
    "two signs": lambda m, n: getattr(m, n).data.view(-1)[:2].neg_(),
    "NaN": lambda m, n: setitem(getattr(m, n).data.view(-1), 0, math.nan),
    "swapped rows": swap_rows,
    "set back": set_back,
    "through numpy": through_numpy,
    "opposite biases": opposite_biases,
    "other data": lambda m, n: setattr(getattr(m, n), "data", random_like(getattr(m, n))),
    "other storage": lambda m, n: torch.no_grad()(getattr(m, n).set_)(random_like(getattr(m, n))),
    "another parameter": lambda m, n: setattr(m, n, nn.Parameter(random_like(getattr(m, n)))),
    "a plain tensor": plain_tensor,
    "load": lambda m, n: m.load_state_dict({n: random_like(getattr(m, n))}, strict=False),
    "load, assigned": lambda m, n: m.load_state_dict(
        {k: random_like(v) for k, v in m.state_dict().items()}, assign=True
    ),
    "vector": lambda m, n: vector_to_parameters(parameters_to_vector(m.parameters()).detach() * 1.5, m.parameters()),
    "flat buffer": lambda m, n: in_a_flat_buffer(m, n).add_(0.5),
    "another dtype": another_dtype,
    "fused step": fused_step,
    "pruned": lambda m, n: prune.random_unstructured(m, n, amount=0.5),
    "weight norm": lambda m, n: getattr(parametrizations.weight_norm(m, n).parametrizations, n).original0.data.mul_(2),
    "not contiguous": lambda m, n: setattr(m, n, nn.Parameter(random_like(getattr(m, n).mT.contiguous()).mT)),
    "copied": copied,
}
MATRICES = ("weight norm", "not contiguous")
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


def fresh(case, module):
    """A new module with clones of the weights that `module` has now."""
    new = dataclasses.replace(case)
    new = new.module if isinstance(module, type(new.module)) else new.single()
    for name in [name for name, _ in new.named_parameters()]:
        setattr(new, name, nn.Parameter(getattr(module, name).detach().clone()))
    return new


def draw_call(draw, case):
    """A function of a module that calls it as is drawn, and returns the results, and the gradients of training."""
    T, rows, is_step = draw(st.sampled_from([1, case.T])), draw(st.sampled_from([1, case.B])), draw(st.booleans())
    mode, zeros = draw(st.sampled_from(["training", *MODES])), draw(st.booleans())
    casts, is_masked = draw(st.booleans()) and case.dtype is F32, draw(st.booleans())
    values, masks = case.rows(slice(rows))
    is_state = [0 < k <= len(case.cell.states) for k in range(len(values))]
    values = [a if a is None or of_state else a[:T].nan_to_num() for a, of_state in zip(values, is_state)]
    masks = {name: a[:T] if name == "reset" else a.clamp(max=T) for name, a in masks.items()} if is_masked else {}

    def call(module, of_weights=True):
        case.zeros = zeros
        steps = not hasattr(module, "step") or (is_step and not case.bidirectional)
        with MODES.get(mode, torch.enable_grad)(), torch.autocast("cpu", BF16) if casts else nullcontext():
            ends, leaves = case.step(module, values) if steps else case.call(module, values, masks)
        wanted = [*leaves, *(module.parameters() if of_weights else ())]
        if mode != "training" or not wanted:
            return ends
        directions = [torch.linspace(-1, 1, a.numel()).view_as(a).to(a.dtype) for a in ends]
        return [*ends, *torch.autograd.grad(ends, wanted, directions, materialize_grads=True)]

    return call


@each_backend
@settings(max_examples=60, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_any_writes_between_any_calls(backend, data):
    """Of any elements, also of weights with more than one digest; and at last one of each kind of write."""
    draw, dtypes = data.draw, (F32,) if "bf16" in backend else (F32, F64, BF16, F16)
    case = draw(cases(backend, dtypes, size=sizes))
    module = draw(st.sampled_from([case.module, case.single() or case.module]))
    calls = [draw_call(draw, case) for _ in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(1, 4))):
        for call in calls:
            for _ in range(draw(st.integers(0, 2))):
                p = draw(st.sampled_from(list(module.parameters())))
                places = draw(st.lists(st.integers(0, p.numel() - 1) | st.just(p.numel() - 1), min_size=1, max_size=3))
                value = draw(st.floats(-4, 4, width=16) | st.sampled_from([math.nan, math.inf, -0.0]))
                with torch.no_grad():
                    draw(st.sampled_from([p.data, p.detach(), p])).view(-1)[places] = value
            assert same(call(module), call(fresh(case, module)))
    write = draw(st.sampled_from([None, *WRITES]))
    names = [name for name, a in module.named_parameters() if a.dim() > 1 or write not in MATRICES]
    if write is None or not names:
        return
    new = WRITES[write](module, draw(st.sampled_from(names)))
    module = new if write == "copied" else module
    for call in [*calls, *calls]:  # some writes leave other parameters
        assert same(call(module, False), call(fresh(case, module), False))


@each_backend
@settings(max_examples=30, **DRAWS)
@given(data=st.data(), threads=splits)
@on_any_split
def test_other_weights_for_one_call(backend, data):
    """They are the weights of this call alone, as they are when it is made."""
    draw, dtypes = data.draw, (F32,) if "bf16" in backend else (F32, F64, BF16, F16)
    case = draw(cases(backend, dtypes, size=sizes))
    module, kind = case.module, draw(st.sampled_from([torch.Tensor, nn.Parameter]))
    other = {name: kind(random_like(p)) for name, p in module.named_parameters()}

    def call(weights):
        with torch.no_grad():
            return case.call(module, run=lambda *a, **k: torch.func.functional_call(module, weights, a, k))[0]

    case.batch_first = module.batch_first = False
    own = call({})
    for name in (None, *other):
        if name is not None:
            other[name].data.add_(0.5)
        new = dataclasses.replace(case).module
        new.load_state_dict(other)
        with torch.no_grad():
            assert same(call(other), case.call(new)[0])
        assert same(call({}), own)
