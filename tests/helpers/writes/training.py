"""Writes of what trains: optimizers, averages, and the foreach operations that these are made of."""

import copy
import inspect
import itertools
from functools import partial

import torch
from torch.optim import swa_utils

from tests.helpers.writes.kinds import chosen, random_like
from tests.helpers.writes.modules import other_state


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


SIMPLE = (average_copied, closure)
PREPARED = (step_in_backward,)
