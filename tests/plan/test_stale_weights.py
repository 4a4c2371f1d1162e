"""Every call computes with the weights as they are, whoever has written to them since the last one, and how.

Calls without gradients keep packed copies of the weights. Each test calls a module, writes to its weights, and calls it
again. The answer must be, bit for bit, that of a new module which is given clones of the weights as they are now. It
must also differ from the answer before the write: otherwise the test could not fail.
"""

import copy
import ctypes
import inspect
import itertools
import math
import pickle
import tempfile
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils

import fastlstm
from fastlstm.backends import numba
from tests.helpers.layers import needs_native

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Setting(NamedTuple):
    backend: str
    dtype: torch.dtype
    cast: bool = False  # calls are made under an autocast to bfloat16


class Kind(NamedTuple):
    """A module, and how it is called."""

    T: int
    B: int
    I: int = 5
    H: int = 7
    how: str = "forward"
    options: dict[str, Any] = {}  # noqa: RUF012  nobody writes to it

    def module(self, setting):
        kind = fastlstm.LSTMCell if self.how == "cell" else fastlstm.LSTM
        return kind(self.I, self.H, dtype=setting.dtype, backend=setting.backend, **self.options)

    def arguments(self, dtype, zeros=False):
        x = torch.randn(*(() if self.how != "forward" else (self.T,)), self.B, self.I).to(dtype)
        copies = self.options.get("num_layers", 1) * (1 + self.options.get("bidirectional", False))
        size = (self.B, self.H) if self.how == "cell" else (copies, self.B, self.H)
        return x, None if zeros else (torch.randn(size).to(dtype), torch.randn(size).to(dtype))

    def call(self, module, arguments, setting, mode=torch.no_grad):
        with mode(), torch.autocast("cpu", torch.bfloat16) if setting.cast else nullcontext():
            first, second = (module.step if self.how == "step" else module)(*arguments)
        return [a.detach() for a in (first, *(second if isinstance(second, tuple) else (second,)))]

    def fresh(self, module, setting):
        """A new module with clones of the weights that `module` has now."""
        new = self.module(setting)
        for name in names_of(new):
            setattr(new, name, nn.Parameter(getattr(module, name).detach().clone()))
        return new


KINDS = {
    "T1-B1": Kind(1, 1),
    "T4-B2": Kind(4, 2),
    "T28-B1": Kind(28, 1),
    "T28-B128": Kind(28, 128),
    "two-layers-both-directions": Kind(4, 2, options={"num_layers": 2, "bidirectional": True}),
    "step": Kind(1, 2, how="step"),
    "cell": Kind(1, 2, how="cell"),
    "T4-B2-H100": Kind(4, 2, 20, 100),
}
LARGE = {  # more than a megabyte of weights
    "T1-B1": Kind(1, 1, 60, 260),
    "T4-B2": Kind(4, 2, 60, 260),
    "step": Kind(1, 1, 60, 260, how="step"),
    "cell": Kind(1, 2, 60, 260, how="cell"),
}
needs_pieces = pytest.mark.skipif(numba.most_pieces() < 2, reason="the processor multiplies no numbers in pieces")
SETTINGS = [
    pytest.param(Setting("numba", torch.float32), id="numba-float32"),
    pytest.param(Setting("numba", torch.float64), id="numba-float64"),
    pytest.param(Setting("numba", torch.bfloat16), id="numba-bfloat16"),  # in the matrix unit where there is one
    pytest.param(Setting("numba", torch.float16), id="numba-float16"),
    pytest.param(Setting("numba", torch.float32, cast=True), id="numba-autocast"),
    pytest.param(Setting("numba-bf16x3", torch.float32), id="numba-bf16x3", marks=needs_pieces),
    pytest.param(Setting("native", torch.float32), id="native-float32", marks=needs_native),
    pytest.param(Setting("native", torch.float64), id="native-float64", marks=needs_native),
    pytest.param(Setting("native", torch.bfloat16), id="native-bfloat16", marks=needs_native),
    pytest.param(Setting("native", torch.float16), id="native-float16", marks=needs_native),
    pytest.param(Setting("native", torch.float32, cast=True), id="native-autocast", marks=needs_native),
]
each_setting = pytest.mark.parametrize("setting", SETTINGS)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, params=[1])
def threads(request):
    """One thread, unless a test asks for more: calls as small as these gain nothing from others."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def names_of(module):
    """The names of the weights, in the order of torch.nn.LSTM: weight_ih, weight_hh, bias_ih, bias_hh of each layer."""
    return [name for name, _ in module.named_parameters()]


def same(got, want):
    """Whether these are the same numbers, where a NaN is the same as another."""
    return all(
        a.dtype is b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(got, want, strict=True)
    )


def largest(w, count=1):
    """The places of the largest elements of a flat tensor, which are not zero and not all the same."""
    return w.abs().topk(count).indices.tolist()


def random_like(p):
    return torch.randn(p.shape).to(p.dtype)


# Forms: what is done to one weight, through whichever tensor that shares its memory.


def element(w):
    w.view(-1)[3] += 1


def last_element(w):
    w.view(-1)[-1] -= 1


def rows(w):
    w[1:3] = 0.75


def mask(w):
    w.mul_(torch.arange(w.numel()).view_as(w) % 3 != 0)


def clamp(w):
    w.clamp_(-0.01, 0.01)


def small_copy(w):
    changed = w.clone()
    changed.view(-1)[5] += 0.5
    w.copy_(changed)


def fill(w):
    w.fill_(0.25)


def add(w):
    w.add_(0.5)


def negative_column(w):
    w[..., 2:3].neg_()


def swap_elements(w):
    w = w.view(-1)
    low, high = w.argmin(), w.argmax()
    w[low], w[high] = w[high].clone(), w[low].clone()


def swap_rows(w):
    column = w.view(len(w), -1)[:, 0]
    pair = torch.stack([column.argmin(), column.argmax()])
    w[pair] = w[pair.flip(0)]


def flip_sign(w):
    w.view(-1)[largest(w.view(-1))] *= -1


def flip_two_signs(w):
    w.view(-1)[largest(w.view(-1), 2)] *= -1


def flip_bit(w):
    """The highest bit of the mantissa of one number."""
    bits = {torch.float64: 51, torch.float32: 22, torch.bfloat16: 6, torch.float16: 9}[w.dtype]
    w.view(-1).view(BITS[w.itemsize])[largest(w.view(-1))] ^= 1 << bits


def masked(w):
    w.masked_fill_(w > w.mean(), -0.5)


def scatter(w):
    w.view(-1).scatter_(0, torch.tensor([0, 9]), torch.tensor([1.0, -1.0], dtype=w.dtype))


def nan(w):
    w.view(-1)[4] = math.nan


def infinity(w):
    w.view(-1)[4] = -math.inf


def huge(w):
    w.view(-1)[4] = 1e30  # which float16 has as infinity, and no matrix unit takes in pieces


FORMS = (
    element, last_element, rows, mask, clamp, small_copy, fill, add, negative_column, swap_elements, swap_rows,
    flip_sign, flip_two_signs, flip_bit, masked, scatter, nan, infinity, huge,
)  # fmt: skip


# Routes: tensors that share a weight's memory. Each is told a module and a name before the first call of the module.
# It gives what makes the tensor when it is time to write.


def data(module, name):
    return lambda: getattr(module, name).data


def detached(module, name):
    return lambda: getattr(module, name).detach()


def itself(module, name):
    return lambda: getattr(module, name)


def made_before(module, name):
    alias = getattr(module, name).data
    return lambda: alias


def in_state_dict(module, name):
    return lambda: module.state_dict()[name]


def through_dlpack(module, name):
    return lambda: torch.from_dlpack(getattr(module, name).detach())


def through_numpy(module, name):
    def alias():
        w = getattr(module, name).detach()
        return torch.from_numpy(w.view(BITS[w.itemsize]).numpy()).view(w.dtype)

    return alias


def of_an_array(module, name):
    p = getattr(module, name)
    array = p.detach().view(BITS[p.itemsize]).numpy().copy()
    p.data = torch.from_numpy(array).view(p.dtype)
    return lambda: torch.from_numpy(array).view(p.dtype)


def through_ctypes(module, name):
    def alias():
        p = getattr(module, name)
        memory = (ctypes.c_char * (p.numel() * p.itemsize)).from_address(p.data_ptr())
        return torch.frombuffer(memory, dtype=p.dtype).view(p.shape)

    return alias


def of_the_storage(module, name):
    def alias():
        p = getattr(module, name)
        return torch.empty(0, dtype=p.dtype).set_(p.untyped_storage(), p.storage_offset(), p.shape, p.stride())

    return alias


def in_shared_memory(module, name):
    module.share_memory()
    return data(module, name)


def in_a_flat_buffer(module, name):
    flat, start = torch.cat([p.detach().flatten() for p in module.parameters()]), 0
    for each, p in module.named_parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        if each == name:
            where = slice(start, start + p.numel()), p.shape
        start += p.numel()
    return lambda: flat[where[0]].view(where[1])


def without_gradients(module, name):
    module.requires_grad_(False)
    return data(module, name)


def of_inference_mode(module, name):
    with torch.inference_mode():
        setattr(module, name, nn.Parameter(getattr(module, name).clone()))
        return data(module, name)


def of_another_module(module, name):
    other = copy.deepcopy(module)
    setattr(module, name, getattr(other, name))
    return data(other, name)


ROUTES = (
    data, detached, itself, made_before, in_state_dict, through_dlpack, through_numpy, of_an_array, through_ctypes,
    of_the_storage, in_shared_memory, in_a_flat_buffer, without_gradients, of_inference_mode, of_another_module,
)  # fmt: skip


def kept_version(p):
    return torch.autograd._unsafe_preserve_version_counter(p)


def inference(p):
    return torch.inference_mode()


MODES = {  # a route, and in what the write is done
    **{f"{route.__name__}": (route, None) for route in ROUTES},
    "itself, in inference mode": (itself, inference),
    "data, in inference mode": (data, inference),
    "itself, its version set back": (itself, kept_version),
}


def written(route, mode, form, name, module):
    """The write of `form` to the weight of this name."""
    opened = route(module, name)

    def write():
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if route is of_inference_mode else torch.no_grad())
            if mode is not None:
                stack.enter_context(mode(getattr(module, name)))
            form(opened())

    return write


# Ways of other kinds. Each is told a module before its first call, and a number by which it may choose a weight. It
# gives the write, which may return the module that is to be called from then on.


def optimizer(kind, options, sparse, module, k):
    made = kind(module.parameters(), **options)
    for p in module.parameters():
        p.grad = torch.zeros_like(p) if sparse else random_like(p)
    if sparse:
        chosen(module, k).grad.view(-1)[3] = 1
    return made.step


def chosen(module, k):
    names = names_of(module)
    return getattr(module, names[k % len(names)])


def optimizers():
    eps = {"lr": 0.5, "eps": 1e-3}  # the usual 1e-8 is zero in float16
    kinds = {
        "SGD": (torch.optim.SGD, {"lr": 1.0}),
        "momentum": (torch.optim.SGD, {"lr": 1.0, "momentum": 0.9}),
        "Adam": (torch.optim.Adam, eps),
        "AdamW": (torch.optim.AdamW, eps),
        "RMSprop": (torch.optim.RMSprop, eps),
        "Adagrad": (torch.optim.Adagrad, eps),
    }
    for (name, (kind, options)), mode in itertools.product(kinds.items(), ("plain", "foreach", "fused")):
        if mode == "fused" and "fused" not in inspect.signature(kind).parameters:
            continue
        chosen = {"foreach": mode == "foreach"} if mode != "fused" else {"fused": True}
        for sparse in (False, True):
            yield (
                f"{name}, {mode}, {'one element' if sparse else 'dense'}",
                partial(optimizer, kind, {**options, **chosen}, sparse),
            )


FOREACH = {
    "add_": lambda a, b: torch._foreach_add_(a, 0.5),
    "add_ of tensors": lambda a, b: torch._foreach_add_(a, b, alpha=0.5),
    "sub_": lambda a, b: torch._foreach_sub_(a, b),
    "mul_": lambda a, b: torch._foreach_mul_(a, 1.5),
    "div_": lambda a, b: torch._foreach_div_(a, 2.0),
    "neg_": lambda a, b: torch._foreach_neg_(a),
    "zero_": lambda a, b: torch._foreach_zero_(a),
    "copy_": lambda a, b: torch._foreach_copy_(a, b),
    "lerp_": lambda a, b: torch._foreach_lerp_(a, b, 0.5),
    "addcmul_": lambda a, b: torch._foreach_addcmul_(a, b, b),
    "clamp_max_": lambda a, b: torch._foreach_clamp_max_(a, 0.0),
}


def foreach(function, of_data, module, k):
    def write():
        weights, others = list(module.parameters()), [random_like(p) for p in module.parameters()]
        with torch.no_grad():
            function([p.data for p in weights] if of_data else weights, others)

    return write


def simple(write):
    """A way that needs nothing before the first call: `write` of the module and one of its weights' names."""

    def prepare(module, k):
        names = names_of(module)
        return lambda: write(module, names[k % len(names)])

    return prepare


def other_data(m, n):
    getattr(m, n).data = random_like(getattr(m, n))


def own_data_cloned(m, n):
    for _ in range(3):
        getattr(m, n).data = getattr(m, n).data.clone().add_(0.5)


def exchange_data(m, n):
    *_, p, q = m.parameters()  # two biases of a layer
    p.data, q.data = q.data, p.data
    p.data.mul_(3)


def set_storage(m, n):
    with torch.no_grad():
        getattr(m, n).set_(random_like(getattr(m, n)))


def replace_parameter(m, n):
    setattr(m, n, nn.Parameter(random_like(getattr(m, n))))


def register_parameter(m, n):
    m.register_parameter(n, nn.Parameter(random_like(getattr(m, n))))


def plain_tensor(m, n):
    new = random_like(getattr(m, n))
    delattr(m, n)
    setattr(m, n, new)


def write_to_plain_tensor(module, k):
    name = names_of(module)[1]
    plain_tensor(module, name)
    return lambda: getattr(module, name).data.view(-1)[3].add_(1)


def write_to_vector(module, k):
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector, module.parameters())
    return lambda: vector[k % len(vector)].add_(1)


def vector_to_parameters(m, n):
    vector = nn.utils.parameters_to_vector(m.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.5, m.parameters())


def other_state(m):
    return {name: random_like(value) for name, value in m.state_dict().items()}


def load(m, n):
    m.load_state_dict(other_state(m))


def load_one(m, n):
    m.load_state_dict({n: random_like(getattr(m, n))}, strict=False)


def load_assigned(m, n):
    m.load_state_dict(other_state(m), assign=True)


def empty_and_load(m, n):
    state = other_state(m)
    m.to_empty(device="cpu").load_state_dict(state)


def another_dtype(dtype, m, n):
    """There and back, and a write on the way."""
    before = getattr(m, n).dtype
    m.to(dtype)
    getattr(m, n).data.mul_(1.5)
    m.to(before)


def initialised(function, m, n):
    function(getattr(m, next(each for each in names_of(m) if "weight_hh" in each)))


def copied(copier, m, n):
    new = copier(m)
    getattr(new, n).data.view(-1)[3] += 1
    return new


def copied_and_left(m, n):
    copy.deepcopy(m)
    getattr(m, n).data.view(-1)[3] += 1


def pruned(m, n):
    prune.random_unstructured(m, n, amount=0.5)


def pruned_before(module, k):
    name = names_of(module)[k % 4]
    prune.random_unstructured(module, name, amount=0.25)
    return lambda: getattr(module, name + "_orig").data.mul_(2)


def pruned_for_good(module, k):
    name = names_of(module)[k % 4]
    prune.random_unstructured(module, name, amount=0.25)

    def write():
        prune.remove(module, name)
        getattr(module, name).data.mul_(2)

    return write


def weight_norm(module, k):
    name = names_of(module)[k % 2]
    parametrizations.weight_norm(module, name)
    return lambda: getattr(module.parametrizations, name).original0.data.mul_(2)


def weight_norm_removed(module, k):
    write = weight_norm(module, k)
    name = next(iter(module.parametrizations))

    def remove():
        write()
        parametrize.remove_parametrizations(module, name)
        getattr(module, name).data.view(-1)[3] += 1

    return remove


def averaged(function, module, k):
    """The module is what averages, of another one's weights."""
    other = copy.deepcopy(module)
    average = swa_utils.AveragedModel(other, multi_avg_fn=function)
    average.module = module
    average.n_averaged += 1
    foreach(FOREACH["copy_"], True, other, k)()
    return lambda: average.update_parameters(other)


def average_copied(m, n):
    other = copy.deepcopy(m)
    other.load_state_dict(other_state(m))
    average = swa_utils.AveragedModel(other, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(other)
    for p, q in zip(m.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(q.data)


def step_in_backward(module, k):
    """An optimizer that runs as soon as a gradient is there."""

    def update(p):
        p.data.sub_(p.grad)
        p.grad = None

    for p in module.parameters():
        p.register_post_accumulate_grad_hook(update)
    return lambda: sum(p.exp().sum() for p in module.parameters()).backward()


def closure(m, n):
    made = torch.optim.LBFGS(m.parameters(), lr=4.0, max_iter=1)

    def loss():
        made.zero_grad()
        total = sum((p.flatten()[:4] - 1).square().sum() for p in m.parameters())
        total.backward()
        return total

    made.step(loss)


def storage_copied(m, n):
    p = getattr(m, n)
    p.untyped_storage().copy_(random_like(p).untyped_storage())


def storage_filled(m, n):
    getattr(m, n).untyped_storage().fill_(0x3C)


def storage_byte(m, n):
    storage, size = getattr(m, n).untyped_storage(), getattr(m, n).itemsize
    storage[2 * size - 1] = storage[2 * size - 1] ^ 0x81  # the sign and an exponent's bit


def moved(m, n):
    p = getattr(m, n)
    ctypes.memmove(p.data_ptr() + p.itemsize, random_like(p[:1]).data_ptr(), p.itemsize)


def through_memoryview(m, n):
    p = getattr(m, n)
    view = memoryview(p.detach().view(torch.uint8).numpy().reshape(-1))
    view[p.itemsize - 1] ^= 0x81


def numpy_element(m, n):
    w = getattr(m, n).detach()
    w.view(BITS[w.itemsize]).numpy()[-1] ^= 1 << (8 * w.itemsize - 2)  # a row's exponents


def numpy_rows(m, n):
    w = getattr(m, n).detach()
    array = w.view(BITS[w.itemsize]).numpy()
    array[:] = array[::-1].copy()


def numpy_sum(m, n):
    w = getattr(m, n).detach()
    if w.dtype == torch.bfloat16:  # of which numpy has none
        numpy_rows(m, n)
    else:
        array = w.numpy()
        array += 0.5


def shared_then_written(m, n):
    getattr(m, n).share_memory_().data.view(-1)[3].add_(1)


def mapped_file(module, k):
    """A file is written to, of which a weight is a mapping."""
    p, directory = chosen(module, k), tempfile.TemporaryDirectory()
    path = Path(directory.name, "weight")
    path.write_bytes(p.detach().view(torch.uint8).numpy().tobytes())
    p.data = torch.from_file(str(path), shared=True, size=p.numel(), dtype=p.dtype).view(p.shape)

    def write():
        with directory, path.open("r+b") as file:
            file.write(random_like(p).view(torch.uint8).numpy().tobytes())

    return write


def swap_tensors(module, k):
    name = names_of(module)[k % 4]
    setattr(module, name, nn.Parameter(getattr(module, name).detach()))  # the first has weak references to it
    return lambda: torch.utils.swap_tensors(getattr(module, name), nn.Parameter(random_like(getattr(module, name))))


def not_contiguous(module, k):
    name = names_of(module)[k % 2]
    setattr(module, name, nn.Parameter(getattr(module, name).detach().mT.contiguous().mT))
    return lambda: getattr(module, name).data[1, 2].add_(1)


def opposite_biases(m, n):
    """Their sum changes by roundings alone."""
    *_, p, q = m.parameters()
    p.data.add_(1000)
    q.data.sub_(1000)


def lowest_bit_of_a_bias(m, n):
    *_, p, _ = m.parameters()
    p.data.view(BITS[p.itemsize])[2] ^= 1


def sign_of_zero(module, k):
    w = chosen(module, k).data.view(-1)
    w[3] = -0.0
    return lambda: w[3].copy_(torch.tensor(0.0))


INITS = {
    "uniform_": nn.init.uniform_, "normal_": nn.init.normal_, "constant_": lambda w: nn.init.constant_(w, 0.3),
    "ones_": nn.init.ones_, "zeros_": nn.init.zeros_, "eye_": nn.init.eye_, "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_, "sparse_": lambda w: nn.init.sparse_(w, 0.5),
}  # fmt: skip
SIMPLE = (
    other_data, own_data_cloned, exchange_data, set_storage, replace_parameter, register_parameter,
    plain_tensor, vector_to_parameters, load, load_one, load_assigned, empty_and_load, copied_and_left, pruned,
    average_copied, closure, storage_copied, storage_filled, storage_byte, moved, through_memoryview, numpy_element,
    numpy_rows, numpy_sum, shared_then_written, opposite_biases, lowest_bit_of_a_bias,
)  # fmt: skip
PREPARED = (
    write_to_plain_tensor, write_to_vector, pruned_before, pruned_for_good, weight_norm, weight_norm_removed,
    step_in_backward, mapped_file, swap_tensors, not_contiguous, sign_of_zero,
)  # fmt: skip
WAYS = {
    **dict(optimizers()),
    **{
        f"foreach {name} of {'data' if of_data else 'parameters'}": partial(foreach, function, of_data)
        for name, function in FOREACH.items()
        for of_data in (False, True)
    },
    **{f"init {name}": simple(partial(initialised, function)) for name, function in INITS.items()},
    **{
        f"to {dtype} and back": simple(partial(another_dtype, dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    },
    **{f"{copier.__name__} written to": simple(partial(copied, copier)) for copier in (copy.copy, copy.deepcopy)},
    "pickled": simple(partial(copied, lambda m: pickle.loads(pickle.dumps(m)))),
    "reset_parameters": simple(lambda m, n: m.reset_parameters()),
    "averaged, EMA": partial(averaged, swa_utils.get_ema_multi_avg_fn(0.5)),
    "averaged, SWA": partial(averaged, swa_utils.get_swa_multi_avg_fn()),
    **{write.__name__: simple(write) for write in SIMPLE},
    **{prepare.__name__: prepare for prepare in PREPARED},
}
UNSEEN = ("lowest_bit_of_a_bias", "sign_of_zero")  # the answer need not change where these are written
OF_HOOKS = ("pruned_before",)  # which a call of `step` does not run


def ways(kind, setting, every=False):
    """Names, ways, and whether the answer must differ. The first are each form by each route, of one weight in turn or
    of `every` weight.
    """
    names = names_of(kind.module(setting))
    for (i, (mode, (route, context))), (j, form) in itertools.product(enumerate(MODES.items()), enumerate(FORMS)):
        for name in names if every else [names[(i + j) % len(names)]]:
            yield f"{form.__name__} of {name} by {mode}", partial(written, route, context, form, name), True
    for k, (name, prepare) in enumerate(WAYS.items()):
        # PyTorch 2.13's fused SGD leaves most elements of 16 bits as they are, where they are many
        unseen = name in UNSEEN or (setting.dtype.itemsize == 2 and name.startswith(("SGD, fused", "momentum, fused")))
        if kind.how != "step" or name not in OF_HOOKS:
            yield name, lambda m, k=k, prepare=prepare: prepare(m, k), not unseen


def problem(kind, setting, prepare):
    """What is wrong after a write, or None."""
    module = kind.module(setting)
    write, arguments = prepare(module), kind.arguments(setting.dtype)
    before = [kind.call(module, arguments, setting) for _ in range(2)][1]
    new = write()
    module = new if isinstance(new, nn.Module) else module
    after = [kind.call(module, arguments, setting) for _ in range(2)]
    want = kind.call(kind.fresh(module, setting), arguments, setting)
    if not same(after[0], want):
        return "stale"
    if not same(after[1], want):
        return "stale the second time"
    return UNCHANGED if same(before, want) else None


UNCHANGED = "the answer is that before the write"


def problems(kind, setting, ways):
    """By the names of ways, what is wrong. Answers of 16 bits may hide a small change, but not for many inputs."""
    found = {}
    for name, prepare, seen in ways:
        for _ in range(6):
            wrong = problem(kind, setting, prepare)
            if wrong != UNCHANGED or not seen:
                break
        if wrong is not None and (wrong != UNCHANGED or seen):
            found[name] = wrong
    return found


@each_kind
@each_setting
def test_a_write_is_seen(setting, kind):
    """A seventh of the ways: each setting, and each kind of call, has all of them in some test."""
    known = [parameter.values[0] for parameter in SETTINGS]
    start = (known.index(setting) + list(KINDS).index(kind)) % 7
    kind = KINDS[kind]
    assert problems(kind, setting, itertools.islice(ways(kind, setting), start, None, 7)) == {}


@pytest.mark.slow
@each_kind
@each_setting
def test_a_write_to_any_weight_is_seen(setting, kind):
    kind = KINDS[kind]
    assert problems(kind, setting, ways(kind, setting, every=True)) == {}


@pytest.mark.parametrize(
    ("kind", "threads"), [("T1-B1", 1), ("T4-B2", 2), ("step", 2), ("cell", 1)], indirect=["threads"]
)
@each_setting
def test_many_weights(setting, kind, threads):
    """One step packs each panel of them as it comes to it, and looks for no change. Threads share the looking."""
    kind = LARGE[kind]
    names = names_of(kind.module(setting))
    chosen = zip((element, last_element, swap_rows, flip_two_signs), names, strict=True)
    table = [(f"{form.__name__} of {name}", partial(written, data, None, form, name), True) for form, name in chosen]
    assert problems(kind, setting, table) == {}


@pytest.mark.parametrize("kind", [Kind(16, 32, 30, 150), Kind(1, 512, 30, 150, how="cell")], ids=["forward", "cell"])
@each_setting
def test_single_elements_of_any_place(setting, kind):
    """In many rows, and in weights that have more than one digest."""
    module, arguments = kind.module(setting), kind.arguments(setting.dtype)
    got, wrong = kind.call(module, arguments, setting), []
    for name, p in module.named_parameters():
        for place in torch.randint(p.numel(), (5,)).tolist():
            before = got
            p.data.view(-1)[place] += 0.5
            got = kind.call(module, arguments, setting)
            if same(got, before) or not same(got, kind.call(kind.fresh(module, setting), arguments, setting)):
                wrong.append((name, place))
    assert wrong == []


@each_setting
@pytest.mark.parametrize("kind", ["T4-B2", "cell"])
def test_finite_differences(setting, kind):
    """Each element in turn is moved up, then down, then back, as whoever checks a derivative does."""
    kind = KINDS[kind]._replace(I=2, H=3)
    module, arguments, eps = kind.module(setting), kind.arguments(setting.dtype), 2.0**-4
    start, wrong = kind.call(module, arguments, setting), []
    with torch.no_grad():
        for name, p in module.named_parameters():
            for i in range(p.numel()):
                kept = p.data.view(-1)[i].clone()
                for move in (eps, -2 * eps, None):
                    if move is None:
                        p.data.view(-1)[i] = kept
                        want = start
                    else:
                        p.data.view(-1)[i] += move
                        want = kind.call(kind.fresh(module, setting), arguments, setting)
                    if not same(kind.call(module, arguments, setting), want):
                        wrong.append((name, i, move))
    assert wrong == []


@each_setting
@pytest.mark.parametrize("kind", ["T1-B1", "T4-B2", "step", "cell"])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("form", [add, nan], ids=lambda form: form.__name__)
def test_what_a_call_from_zeros_may_leave_unseen_is_seen_by_the_next(setting, kind, name, form):
    """A step from zeros need not look at weight_hh where it has no product of it."""
    kind = KINDS[kind]
    module, zeros, states = kind.module(setting), *(kind.arguments(setting.dtype, z) for z in (True, False))
    before = [kind.call(module, arguments, setting) for arguments in (zeros, states, zeros, states)][-1]
    form(getattr(module, name if kind.how == "cell" else name + "_l0").data)
    new = kind.fresh(module, setting)
    for arguments in (zeros, states, zeros, states):
        assert same(kind.call(module, arguments, setting), kind.call(new, arguments, setting))
    assert not same(before, kind.call(new, states, setting))


@each_setting
@pytest.mark.parametrize("kind", ["T1-B1", "T4-B2", "two-layers-both-directions", "cell"])
@pytest.mark.parametrize("type_", [torch.Tensor, nn.Parameter])
def test_other_weights_for_one_call(setting, kind, type_):
    """They are the weights of this call alone, as they are when it is made."""
    kind = KINDS[kind]
    module, arguments = kind.module(setting), kind.arguments(setting.dtype)
    own = [kind.call(module, arguments, setting) for _ in range(2)][1]
    other = {name: type_(random_like(p)) for name, p in module.named_parameters()}

    def call(*arguments):
        return torch.func.functional_call(module, other, arguments)

    results = []
    for name in (None, *other):
        if name is not None:
            add(other[name].data)
        got = kind.call(call, arguments, setting)
        new = kind.module(setting)
        new.load_state_dict(other)
        assert same(got, kind.call(new, arguments, setting))
        assert same(kind.call(module, arguments, setting), own)
        results.append(got)
    assert not any(same(a, b) for a, b in itertools.combinations([own, *results], 2))


@each_setting
def test_writes_within_one_autocast(setting):
    """What autocast itself keeps of a cast, for as long as it lasts, is no part of a call."""
    kind = KINDS["T4-B2"]
    module, arguments = kind.module(setting), kind.arguments(setting.dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for name in names_of(module):
            before = [kind.call(module, arguments, setting) for _ in range(2)][1]
            add(getattr(module, name).data)
            got = kind.call(module, arguments, setting)
            assert same(got, kind.call(kind.fresh(module, setting), arguments, setting))
            assert not same(got, before)


CALLS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


@each_setting
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_writes_between_any_calls(setting, data):
    draw = data.draw
    how = draw(st.sampled_from(["forward", "step", "cell"]))
    I, H = draw(st.sampled_from([1, 2, 7, 16, 33, 100])), draw(st.sampled_from([1, 2, 7, 16, 33, 100]))
    options = {"bias": draw(st.booleans())}
    module = Kind(1, 1, I, H, how, options).module(setting)
    for _ in range(draw(st.integers(2, 6))):
        for _ in range(draw(st.integers(0, 3))):
            p = draw(st.sampled_from(list(module.parameters())))
            places = draw(st.lists(st.integers(0, p.numel() - 1), min_size=1, max_size=3))
            value = draw(st.floats(-4, 4, width=16) | st.sampled_from([math.nan, math.inf, -0.0]))
            w = draw(st.sampled_from([p.data, p.detach(), p]))
            with torch.no_grad():
                w.view(-1)[places] = value
        kind = Kind(draw(st.sampled_from([1, 2, 9])), draw(st.sampled_from([1, 3, 40])), I, H, how, options)
        arguments, mode = kind.arguments(setting.dtype, draw(st.booleans())), draw(st.sampled_from(list(CALLS)))
        got = kind.call(module, arguments, setting, CALLS[mode])
        assert same(got, kind.call(kind.fresh(module, setting), arguments, setting, CALLS[mode]))
