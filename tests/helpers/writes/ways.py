"""The ways to write to a module's weights, and what is wrong after each of them."""

import copy
import itertools
import pickle
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize, prune, vector_to_parameters

from tests.helpers.writes.forms import BITS, FORMS, MODES, written
from tests.helpers.writes.kinds import names_of, same

# Of the module m and the name n of a weight; WRITES has those of one line.


def random_like(p):
    return torch.randn(p.shape).to(p.dtype)


def other_state(m):
    return {name: random_like(value) for name, value in m.state_dict().items()}


def vector_of(m):
    return parameters_to_vector(m.parameters()).detach()


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
    "shared, then written": lambda m, n: getattr(m, n).share_memory_().data.view(-1)[3].add_(1),
    "opposite biases": opposite_biases,
    "lowest bit of a bias": lowest_bit_of_a_bias,
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


OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 1.0, "foreach": False}),
    **{
        f"Adam, {mode}": (torch.optim.Adam, {"lr": 0.5, "eps": 1e-3, mode: True})  # the usual 1e-8 is zero in float16
        for mode in ("foreach", "fused")
    },
}


def step_in_backward(module, k):
    """An optimizer that runs as soon as a gradient is there."""

    def update(p):
        p.data.sub_(p.grad)
        p.grad = None

    for p in module.parameters():
        p.register_post_accumulate_grad_hook(update)
    return lambda: sum(p.exp().sum() for p in module.parameters()).backward()


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
    step_in_backward, swap_tensors, not_contiguous, sign_of_zero, write_to_plain_tensor, write_to_vector,
    pruned_before, pruned_for_good, weight_norm, weight_norm_removed,
)  # fmt: skip
WAYS = {
    **{
        f"{name}, {'one element' if sparse else 'dense'}": partial(optimizer, *kind, sparse)
        for name, kind in OPTIMIZERS.items()
        for sparse in (False, True)
    },
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
        if kind.how != "step" or name not in OF_HOOKS:
            yield name, lambda m, k=k, prepare=prepare: prepare(m, k), name not in UNSEEN


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
