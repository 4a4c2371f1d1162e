"""What is done to one weight, and through which tensor that shares its memory."""

import copy
import math
from contextlib import ExitStack
from functools import partial
from operator import setitem

import torch
from torch import nn

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def place_of_largest(w, count=1):
    """The places of the largest elements of a flat tensor, which are not zero and not all the same."""
    return w.abs().topk(count).indices.tolist()


def swap_elements(w):
    w = w.view(-1)
    low, high = w.argmin(), w.argmax()
    w[low], w[high] = w[high].clone(), w[low].clone()


def swap_rows(w):
    column = w.view(len(w), -1)[:, 0]
    rows = torch.stack([column.argmin(), column.argmax()])
    w[rows] = w[rows.flip(0)]


def flip_signs(count, w):
    w.view(-1)[place_of_largest(w.view(-1), count)] *= -1


def flip_bit(w):
    """The highest bit of the mantissa of one number."""
    bit = {torch.float64: 51, torch.float32: 22, torch.bfloat16: 6, torch.float16: 9}[w.dtype]
    w.view(-1).view(BITS[w.itemsize])[place_of_largest(w.view(-1))] ^= 1 << bit


def small_copy(w):
    changed = w.clone()
    changed.view(-1)[5] += 0.5
    w.copy_(changed)


FORMS = {  # what is done to one weight, through whichever tensor that shares its memory
    "element": lambda w: setitem(w.view(-1), 3, w.view(-1)[3] + 1),
    "last element": lambda w: w.view(-1)[-1].sub_(1),
    "rows": lambda w: setitem(w, slice(1, 3), 0.75),
    "mask": lambda w: w.mul_(torch.arange(w.numel()).view_as(w) % 3 != 0),
    "clamp": lambda w: w.clamp_(-0.01, 0.01),
    "small copy": small_copy,
    "fill": lambda w: w.fill_(0.25),
    "add": lambda w: w.add_(0.5),
    "negative column": lambda w: w[..., 2:3].neg_(),
    "swapped elements": swap_elements,
    "swapped rows": swap_rows,
    "sign": partial(flip_signs, 1),
    "two signs": partial(flip_signs, 2),
    "bit": flip_bit,
    "masked fill": lambda w: w.masked_fill_(w > w.mean(), -0.5),
    "scatter": lambda w: w.view(-1).scatter_(0, torch.tensor([0, 9]), torch.tensor([1.0, -1.0], dtype=w.dtype)),
    "NaN": lambda w: setitem(w.view(-1), 4, math.nan),
    "infinity": lambda w: setitem(w.view(-1), 4, -math.inf),
    "huge": lambda w: setitem(w.view(-1), 4, 1e30),  # which float16 has as infinity, and no matrix unit takes in pieces
}


# Routes: tensors that share a weight's memory. Each is told a module and a name before the first call of the module.
# It gives what makes the tensor when it is time to write.


def data(module, name):
    return lambda: getattr(module, name).data


def itself(module, name):
    return lambda: getattr(module, name)


def made_before(module, name):
    alias = getattr(module, name).data
    return lambda: alias


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


def in_a_flat_buffer(module, name):
    flat, start = torch.cat([p.detach().flatten() for p in module.parameters()]), 0
    for each, p in module.named_parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        if each == name:
            where = slice(start, start + p.numel()), p.shape
        start += p.numel()
    return lambda: flat[where[0]].view(where[1])


def of_inference_mode(module, name):
    with torch.inference_mode():
        setattr(module, name, nn.Parameter(getattr(module, name).clone()))
        return data(module, name)


def of_another_module(module, name):
    other = copy.deepcopy(module)
    setattr(module, name, getattr(other, name))
    return data(other, name)


MODES = {  # a route, and in what the write is done
    "data": (data, None),
    "itself": (itself, None),
    "itself, its version set back": (itself, lambda p: torch.autograd._unsafe_preserve_version_counter(p)),
    "made before": (made_before, None),
    "through numpy": (through_numpy, None),
    "of an array": (of_an_array, None),
    "in a flat buffer": (in_a_flat_buffer, None),
    "of inference mode": (of_inference_mode, lambda p: torch.inference_mode()),
    "of another module": (of_another_module, None),
}


def written(mode, form, name, module):
    """The write of a form by a mode to the weight of this name."""
    route, context = MODES[mode]
    alias = route(module, name)

    def write():
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if context is not None:
                stack.enter_context(context(getattr(module, name)))
            FORMS[form](alias())

    return write
