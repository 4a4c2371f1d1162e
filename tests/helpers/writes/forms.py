"""What is done to one weight, and through which tensor that shares its memory."""

import copy
import ctypes
import math
from contextlib import ExitStack

import torch
from torch import nn

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def largest(w, count=1):
    """The places of the largest elements of a flat tensor, which are not zero and not all the same."""
    return w.abs().topk(count).indices.tolist()


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
