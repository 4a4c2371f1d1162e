"""Every way to write, and what is wrong after each of them."""

import copy
import itertools
import pickle
from functools import partial

import torch
from torch import nn
from torch.optim import swa_utils

from tests.helpers.writes import memory, modules, training
from tests.helpers.writes.forms import FORMS, MODES, written
from tests.helpers.writes.kinds import names_of, same
from tests.helpers.writes.modules import simple

INITS = {
    "uniform_": nn.init.uniform_, "normal_": nn.init.normal_, "constant_": lambda w: nn.init.constant_(w, 0.3),
    "ones_": nn.init.ones_, "zeros_": nn.init.zeros_, "eye_": nn.init.eye_, "xavier_uniform_": nn.init.xavier_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_, "sparse_": lambda w: nn.init.sparse_(w, 0.5),
}  # fmt: skip
WAYS = {
    **dict(training.optimizers()),
    **{
        f"foreach {name} of {'data' if of_data else 'parameters'}": partial(training.foreach, function, of_data)
        for name, function in training.FOREACH.items()
        for of_data in (False, True)
    },
    **{f"init {name}": simple(partial(modules.initialised, function)) for name, function in INITS.items()},
    **{
        f"to {dtype} and back": simple(partial(modules.another_dtype, dtype))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    },
    **{
        f"{copier.__name__} written to": simple(partial(modules.copied, copier))
        for copier in (copy.copy, copy.deepcopy)
    },
    "pickled": simple(partial(modules.copied, lambda m: pickle.loads(pickle.dumps(m)))),
    "reset_parameters": simple(lambda m, n: m.reset_parameters()),
    "averaged, EMA": partial(training.averaged, swa_utils.get_ema_multi_avg_fn(0.5)),
    "averaged, SWA": partial(training.averaged, swa_utils.get_swa_multi_avg_fn()),
    **{write.__name__: simple(write) for write in (*modules.SIMPLE, *training.SIMPLE, *memory.SIMPLE)},
    **{prepare.__name__: prepare for prepare in (*modules.PREPARED, *training.PREPARED, *memory.PREPARED)},
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
