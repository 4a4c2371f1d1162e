"""Layers of every kind, and all that calls of them return: what tests of the kernels' threads and memory compare."""

import torch

import fastlstm
from fastlstm import cells
from tests.helpers.modules import flat
from tests.helpers.rnn import gadget, of_heads, of_heads_and_rows, of_products


def rnn(cell, **options):
    return lambda I, H, dtype, **others: fastlstm.RNN(cell, I, H, dtype=dtype, **options, **others)


def of(kind, **options):
    return lambda I, H, dtype, **others: kind(I, H, dtype=dtype, **options, **others)


def projected(I, H, dtype, **others):
    return fastlstm.LSTM(I, H, proj_size=H // 2, dtype=dtype, **others)


KINDS = {
    "LSTM": of(fastlstm.LSTM),
    "projected": projected,
    "GRU": of(fastlstm.GRU),
    "Elman": of(fastlstm.Elman),
    "regularized": of(fastlstm.LSTM, recurrent_dropout=0.3, zoneout=(0.2, 0.1)),
    "params": rnn(gadget),
    "norms": rnn(cells.layer_norm_lstm),
    "heads": rnn(of_heads, heads=3),
    "means": rnn(of_heads_and_rows, heads=3),
    "products": rnn(cells.gru_reset_before),
    "many products": rnn(of_products, heads=3),
}
OF_NATIVE = "LSTM", "GRU"  # the others run on `numba` alone


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


def masks(T, B, place):
    return {"lengths": place(torch.randint(0, T + 1, (B,))), "reset": place(torch.rand(T, B) < 0.3)}


def states_of(module, B, H, dtype, place, scale=0.1):
    """Initial states, as the module takes them."""
    widths = [getattr(module, "proj_size", 0) or H, *[H] * (len(module._cell.states) - 1)]
    hx = [place(torch.randn(1, B, width).mul(scale).to(dtype)) for width in widths]
    return (*hx,) if len(hx) > 1 else hx[0]


def results(make, sizes, dtype, masked, states, x_grad, bias, seed, place=as_it_is):
    """Outputs, last states and all gradients, then the outputs without gradients and those of a step.

    `place` copies what the kernels read from outside: inputs, states, weights, masks and gradients of outputs.
    """
    torch.manual_seed(seed)
    T, B, I, H = sizes
    module = placed(make(I, H, dtype, bias=bias), place)
    x, hx = place(torch.randn(T, B, I).to(dtype)), states_of(module, B, H, dtype, place) if states else None
    inputs = {name: place(torch.randn(T, B, H).to(dtype)) for name in module._cell.inputs}
    options = (masks(T, B, place) if masked else {}) | ({"inputs": inputs} if inputs else {})
    leaves = [*([x] if x_grad else ()), *(flat(hx) if states else ()), *inputs.values()]
    for a in leaves:
        a.requires_grad_()
    found = flat(module(x, hx, **options))
    directions = [place(torch.randn(a.shape).to(dtype)) for a in found]
    found += torch.autograd.grad(found, [*leaves, *module.parameters()], directions)
    with torch.no_grad():
        found += flat(module.eval()(x, hx, **options))
        found += flat(module.step(x[0], hx, **({"inputs": {k: a[0] for k, a in inputs.items()}} if inputs else {})))
    return [a.detach() for a in found]


def results_of_int8(make, sizes, activations, masked, states, seed, place=as_it_is):
    torch.manual_seed(seed)
    T, B, I, H = sizes
    module = placed(fastlstm.quantize(make(I, H, torch.float32), activations), place)
    # Where a GRU begins with a state outside [-1, 1], each step rounds once more.
    hx = states_of(module, B, H, torch.float32, place, scale=1.0) if states else None
    x, options = place(torch.randn(T, B, I)), masks(T, B, place) if masked else {}
    found = flat(module(x, hx, **options))
    # A call that autograd records follows no plan, and packs the weights for itself.
    return [*found, *(a.detach() for a in flat(module(x.requires_grad_(), hx, **options)))]


def results_of_stream(make, sizes, seed, place=as_it_is):
    """Outputs of T calls, and outputs and states of T calls of `step`, with one row more and states of its own."""
    torch.manual_seed(seed)
    T, B, I, H = sizes
    stream, state = placed(make(I, H, torch.float32), place).stream(B), None
    found = [stream(place(torch.randn(B, I))).clone() for _ in range(T)]
    for _ in range(T):
        result = stream.step(place(torch.randn(B + 1, I)), state)
        found += flat(result)
        state = result[1]
    return found


def results_of_ensemble(make, sizes, count, seed, place=as_it_is):
    torch.manual_seed(seed)
    T, B, I, H = sizes
    ensemble = placed(fastlstm.Ensemble([make(I, H, torch.float32) for _ in range(count)]), place)
    x = place(torch.randn(count, T, B, I)).requires_grad_()
    found = flat(ensemble(x))
    directions = [place(torch.randn(a.shape)) for a in found]
    return [a.detach() for a in (*found, *torch.autograd.grad(found, [x, *ensemble.parameters()], directions))]
