"""All that calls of a case return: what tests of the kernels' threads and memory compare."""

from dataclasses import replace

import torch

import fastlstm
from tests.helpers.cases import PROJECTED, REGULARIZED
from tests.helpers.modules import flat

OF_NATIVE = "lstm", "gru"  # the others run on `numba` alone
OF_X = *OF_NATIVE, "elman_tanh", "layer_norm_lstm", "of_heads", "gru_reset_before"  # which have no inputs beside x
NAMES = *OF_X, PROJECTED, REGULARIZED, "gadget", "of_heads_and_rows", "of_products"


def as_it_is(a):
    return a


def placed(module, place):
    """A module whose weights lie where `place` puts them."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, a in tensors.items():
                if a is not None:
                    new = place(a.detach())
                    tensors[name] = torch.nn.Parameter(new) if isinstance(a, torch.nn.Parameter) else new
    return module


def new(case, place):
    """The case with a module that no call has made plans of, whose tensors `place` copies."""
    case = replace(case)
    case.place, case.module = place, placed(case.module, place)
    case.masks = {name: place(a) for name, a in case.masks.items()}
    return case


def results(case, place=as_it_is):
    """Outputs, last states and all gradients, then the outputs without gradients and those of a step.

    `place` copies what the kernels read from outside: inputs, states, weights, masks and gradients of outputs.
    """
    case = new(case, place)
    outputs, gradients = case.results()
    with torch.no_grad():
        found = [*outputs, *gradients, *case.call(case.module.eval())[0]]
        return found if case.bidirectional or 0 in (case.T, case.B) else [*found, *case.step(case.module)[0]]


def results_of_int8(case, activations, place=as_it_is):
    case = new(case, place)
    module = placed(fastlstm.quantize(case.module, activations), place)
    x, *states = [place(a.nan_to_num()) for a in case.values]
    hx = None if case.zeros else tuple(states) if len(states) > 1 else states[0]
    found = flat(module(x, hx, **case.masks))
    # A call that autograd records follows no plan, and packs the weights for itself.
    return [*found, *(a.detach() for a in flat(module(x.requires_grad_(), hx, **case.masks)))]


def results_of_stream(case, place=as_it_is):
    """Outputs of T calls, and outputs and states of T calls of `step`, with one row more and states of its own."""
    case, state = new(case, place), None
    stream, found = case.module.stream(case.B), []
    for _ in range(case.T):
        found.append(stream(place(torch.randn(case.B, case.I))).clone())
    for _ in range(case.T):
        result = stream.step(place(torch.randn(case.B + 1, case.I)), state)
        found += flat(result)
        state = result[1]
    return found


def results_of_ensemble(case, count, place=as_it_is):
    modules = [replace(case, seed=case.seed + k).module for k in range(count)]
    ensemble = placed(fastlstm.Ensemble(modules), place)
    x = place(torch.randn(count, case.T, case.B, case.I)).requires_grad_()
    found = flat(ensemble(x))
    directions = [place(torch.randn(a.shape)) for a in found]
    return [a.detach() for a in (*found, *torch.autograd.grad(found, [x, *ensemble.parameters()], directions))]
