"""Every way to write to a module's weights, and what is wrong after each of them."""

import copy
import ctypes
import inspect
import itertools
import pickle
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters
from torch.optim import swa_utils

from tests.helpers.writes.forms import BITS, FORMS, MODES, written
from tests.helpers.writes.kinds import names_of, same

# Of the module m and the name n of a weight; WRITES has those of one line.


def random_like(p):
    return torch.randn(p.shape).to(p.dtype)


def other_state(m):
    return {name: random_like(value) for name, value in m.state_dict().items()}


def numbers_of(m, n):
    """A weight as numpy's whole numbers, which share its memory."""
    w = getattr(m, n).detach()
    return w.view(BITS[w.itemsize]).numpy()


def vector_of(m):
    return parameters_to_vector(m.parameters()).detach()


def initialised(function, m, n):
    function(getattr(m, next(each for each in names_of(m) if "weight_hh" in each)))


def own_data_cloned(m, n):
    for _ in range(3):
        getattr(m, n).data = getattr(m, n).data.clone().add_(0.5)


def exchange_data(m, n):
    *_, p, q = m.parameters()  # two biases of a layer
    p.data, q.data = q.data, p.data
    p.data.mul_(3)


def opposite_biases(m, n):
    """Their sum changes by roundings alone."""
    *_, p, q = m.parameters()
    p.data.add_(1000)
    q.data.sub_(1000)


def plain_tensor(m, n):
    new = random_like(getattr(m, n))
    delattr(m, n)
    setattr(m, n, new)


def empty_and_load(m, n):
    state = other_state(m)
    m.to_empty(device="cpu").load_state_dict(state)


def another_dtype(dtype, m, n):
    """There and back, and a write on the way."""
    before = getattr(m, n).dtype
    m.to(dtype)
    getattr(m, n).data.mul_(1.5)
    m.to(before)


def copied(copier, m, n):
    new = copier(m)
    getattr(new, n).data.view(-1)[3] += 1
    return new


def lowest_bit_of_a_bias(m, n):
    *_, p, _ = m.parameters()
    p.data.view(BITS[p.itemsize])[2] ^= 1


def rows_by_numpy(m, n):
    numbers_of(m, n)[:] = numbers_of(m, n)[::-1].copy()


def storage_byte(m, n):
    storage, place = getattr(m, n).untyped_storage(), 2 * getattr(m, n).itemsize - 1
    storage[place] = storage[place] ^ 0x81  # the sign and an exponent's bit


def moved(m, n):
    p = getattr(m, n)
    ctypes.memmove(p.data_ptr() + p.itemsize, random_like(p[:1]).data_ptr(), p.itemsize)


def through_memoryview(m, n):
    p = getattr(m, n)
    memoryview(p.detach().view(torch.uint8).numpy().reshape(-1))[p.itemsize - 1] ^= 0x81


def element_by_numpy(m, n):
    numbers_of(m, n)[-1] ^= 1 << (8 * getattr(m, n).itemsize - 2)  # a row's exponents


def sum_by_numpy(m, n):
    if getattr(m, n).dtype == torch.bfloat16:  # of which numpy has none
        rows_by_numpy(m, n)
    else:
        array = getattr(m, n).detach().numpy()
        array += 0.5


def average_copied(m, n):
    other = copy.deepcopy(m)
    other.load_state_dict(other_state(m))
    average = swa_utils.AveragedModel(other, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(other)
    for p, q in zip(m.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(q.data)


def closure(m, n):
    optimizer = torch.optim.LBFGS(m.parameters(), lr=4.0, max_iter=1)

    def loss():
        optimizer.zero_grad()
        total = sum((p.flatten()[:4] - 1).square().sum() for p in m.parameters())
        total.backward()
        return total

    optimizer.step(loss)


INITS = {
    "uniform_": nn.init.uniform_, "normal_": nn.init.normal_, "constant_": lambda w: nn.init.constant_(w, 0.3),
    "ones_": nn.init.ones_, "zeros_": nn.init.zeros_, "eye_": nn.init.eye_, "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_, "sparse_": lambda w: nn.init.sparse_(w, 0.5),
}  # fmt: skip
COPIERS = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
WRITES = {
    "other data": lambda m, n: setattr(getattr(m, n), "data", random_like(getattr(m, n))),
    "own data, cloned": own_data_cloned,
    "exchanged data": exchange_data,
    "other storage": lambda m, n: torch.no_grad()(getattr(m, n).set_)(random_like(getattr(m, n))),
    "another parameter": lambda m, n: setattr(m, n, nn.Parameter(random_like(getattr(m, n)))),
    "register_parameter": lambda m, n: m.register_parameter(n, nn.Parameter(random_like(getattr(m, n)))),
    "a plain tensor": plain_tensor,
    "vector_to_parameters": lambda m, n: vector_to_parameters(vector_of(m) * 1.5, m.parameters()),
    "load": lambda m, n: m.load_state_dict(other_state(m)),
    "load one": lambda m, n: m.load_state_dict({n: random_like(getattr(m, n))}, strict=False),
    "load, assigned": lambda m, n: m.load_state_dict(other_state(m), assign=True),
    "empty and load": empty_and_load,
    "reset_parameters": lambda m, n: m.reset_parameters(),
    "pruned": lambda m, n: prune.random_unstructured(m, n, amount=0.5),
    "copied and left": lambda m, n: copied(copy.deepcopy, m, n) and getattr(m, n).data.view(-1)[3].add_(1),
    "average copied": average_copied,
    "closure": closure,
    "storage copied": lambda m, n: getattr(m, n).untyped_storage().copy_(random_like(getattr(m, n)).untyped_storage()),
    "storage filled": lambda m, n: getattr(m, n).untyped_storage().fill_(0x3C),
    "storage's byte": storage_byte,
    "memmove": moved,
    "memoryview": through_memoryview,
    "element by numpy": element_by_numpy,
    "rows by numpy": rows_by_numpy,
    "sum by numpy": sum_by_numpy,
    "shared, then written": lambda m, n: getattr(m, n).share_memory_().data.view(-1)[3].add_(1),
    "opposite biases": opposite_biases,
    "lowest bit of a bias": lowest_bit_of_a_bias,
    **{f"init {name}": partial(initialised, function) for name, function in INITS.items()},
    **{
        f"to {dtype} and back": partial(another_dtype, dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    },
    **{f"{name} written to": partial(copied, copier) for name, copier in COPIERS.items()},
}


# Of a module and a number by which a weight is chosen, before the first call: they return the write.


def simple(write, module, k):
    names = names_of(module)
    return lambda: write(module, names[k % len(names)])


def chosen(module, k):
    names = names_of(module)
    return getattr(module, names[k % len(names)])


def optimizer(kind, options, sparse, module, k):
    made = kind(module.parameters(), **options)
    for p in module.parameters():
        p.grad = torch.zeros_like(p) if sparse else random_like(p)
    if sparse:
        chosen(module, k).grad.view(-1)[3] = 1
    return made.step


def optimizers():
    eps = {"lr": 0.5, "eps": 1e-3}  # the usual 1e-8 is zero in float16
    kinds = {
        "SGD": (torch.optim.SGD, {"lr": 1.0}),
        "momentum": (torch.optim.SGD, {"lr": 1.0, "momentum": 0.9}),
        **{name: (getattr(torch.optim, name), eps) for name in ("Adam", "AdamW", "RMSprop", "Adagrad")},
    }
    modes = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    for (name, (kind, options)), (mode, chosen) in itertools.product(kinds.items(), modes.items()):
        if mode in ("plain", "foreach") or "fused" in inspect.signature(kind).parameters:
            for sparse in (False, True):
                prepare = partial(optimizer, kind, {**options, **chosen}, sparse)
                yield f"{name}, {mode}, {'one element' if sparse else 'dense'}", prepare


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


def averaged(function, module, k):
    """The module is what averages, of another one's weights."""
    other = copy.deepcopy(module)
    average = swa_utils.AveragedModel(other, multi_avg_fn=function)
    average.module = module
    average.n_averaged += 1
    foreach(FOREACH["copy_"], True, other, k)()
    return lambda: average.update_parameters(other)


def step_in_backward(module, k):
    """An optimizer that runs as soon as a gradient is there."""

    def update(p):
        p.data.sub_(p.grad)
        p.grad = None

    for p in module.parameters():
        p.register_post_accumulate_grad_hook(update)
    return lambda: sum(p.exp().sum() for p in module.parameters()).backward()


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


def sign_of_zero(module, k):
    w = chosen(module, k).data.view(-1)
    w[3] = -0.0
    return lambda: w[3].copy_(torch.tensor(0.0))


def write_to_plain_tensor(module, k):
    name = names_of(module)[1]
    plain_tensor(module, name)
    return lambda: getattr(module, name).data.view(-1)[3].add_(1)


def write_to_vector(module, k):
    vector = vector_of(module)
    vector_to_parameters(vector, module.parameters())
    return lambda: vector[k % len(vector)].add_(1)


def pruned_before(module, k):
    name = names_of(module)[k % 4]
    prune.random_unstructured(module, name, amount=0.25)
    return lambda: getattr(module, name + "_orig").data.mul_(2)


def pruned_for_good(module, k):
    name = names_of(module)[k % 4]
    prune.random_unstructured(module, name, amount=0.25)
    return lambda: prune.remove(module, name) and getattr(module, name).data.mul_(2)


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


PREPARED = (
    step_in_backward, mapped_file, swap_tensors, not_contiguous, sign_of_zero, write_to_plain_tensor, write_to_vector,
    pruned_before, pruned_for_good, weight_norm, weight_norm_removed,
)  # fmt: skip
WAYS = {
    **dict(optimizers()),
    **{
        f"foreach {name} of {'data' if of_data else 'parameters'}": partial(foreach, function, of_data)
        for name, function in FOREACH.items()
        for of_data in (False, True)
    },
    "averaged, EMA": partial(averaged, swa_utils.get_ema_multi_avg_fn(0.5)),
    "averaged, SWA": partial(averaged, swa_utils.get_swa_multi_avg_fn()),
    **{name: partial(simple, write) for name, write in WRITES.items()},
    **{prepare.__name__: prepare for prepare in PREPARED},
}
UNSEEN = ("lowest bit of a bias", "sign_of_zero")  # the answer need not change where these are written
OF_HOOKS = ("pruned_before",)  # which a call of `step` does not run


def ways(kind, setting, every=False):
    """Names, ways, and whether the answer must differ. The first are each form by each mode, of one weight in turn or
    of `every` weight.
    """
    names = names_of(kind.module(setting))
    for (i, mode), (j, form) in itertools.product(enumerate(MODES), enumerate(FORMS)):
        for name in names if every else [names[(i + j) % len(names)]]:
            yield f"{form} of {name} by {mode}", partial(written, mode, form, name), True
    for k, (name, prepare) in enumerate(WAYS.items()):
        # PyTorch 2.13's fused SGD leaves most elements of 16 bits as they are, where they are many
        unseen = name in UNSEEN or (setting.dtype.itemsize == 2 and name.startswith(("SGD, fused", "momentum, fused")))
        if kind.how != "step" or name not in OF_HOOKS:
            yield name, lambda m, k=k, prepare=prepare: prepare(m, k), not unseen


UNCHANGED = "the answer is that before the write"


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
