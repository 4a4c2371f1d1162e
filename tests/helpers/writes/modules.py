"""Writes by way of the module: other tensors for its weights, states that are loaded, copies, parametrizations."""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.helpers.writes.kinds import names_of, random_like


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


SIMPLE = (
    other_data, own_data_cloned, exchange_data, set_storage, replace_parameter, register_parameter, plain_tensor,
    vector_to_parameters, load, load_one, load_assigned, empty_and_load, copied_and_left, pruned,
)  # fmt: skip
PREPARED = (write_to_plain_tensor, write_to_vector, pruned_before, pruned_for_good, weight_norm, weight_norm_removed)
