"""Hooks of `torch.nn.utils` that compute a weight before each call of a module: pruning, and the old norms of weights.
They leave a plain tensor in its place, which `LSTM.step`, that does not call the module, would read from the last call.
"""

from copy import copy
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# the classes of these hooks, and the functions of `torch.nn.utils` that remove them and keep the weights
REMOVERS: dict[type, str] = {
    BasePruningMethod: "prune.remove",
    WeightNorm: "remove_weight_norm",
    SpectralNorm: "remove_spectral_norm",
}


def weight_hooks(module: Any) -> list[tuple[int, Any]]:
    """Return the hooks of a module that compute weights, in the order in which they run, each with its key."""
    return [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, tuple(REMOVERS))]


def compute_weights(module: Any) -> None:
    """Run the hooks of a module that compute weights, as a call of the module would. They read nothing of its input."""
    for _, hook in weight_hooks(module):
        hook(module, ())


def frozen(module: Any) -> Any:
    """Return a module of the same class and options, in eval mode, with computed tensors of its own, as its children.
    All else is shared with `module`: some of it, such as a hook that holds a lock, cannot be copied.
    """
    cls: Any = type(module)
    new = cls.__new__(cls)
    vars(new).update(
        {name: _own(a) for name, a in vars(module).items() if name not in ("_plans", "_compiled_call_impl")}
    )
    new._parameters.update({name: a if a is None else Parameter(_own(a), False) for name, a in new._parameters.items()})
    new._buffers.update({name: _own(a) for name, a in new._buffers.items()})
    new._modules.update({name: a if a is None else frozen(a) for name, a in new._modules.items()})
    vars(new)["training"] = False
    for key, hook in reversed(weight_hooks(new)):
        hook.remove(new)
        del new._forward_pre_hooks[key]
    if parametrize.is_parametrized(new):
        weights = {name: getattr(new, name) for name in new.parametrizations}
        new.__class__, _ = cls.__bases__[0], new._modules.pop("parametrizations")
        for name, a in weights.items():
            new.register_parameter(name, Parameter(a.detach()))
    return new.requires_grad_(False)


def _own(a: Any) -> Any:
    """Return a copy of a tensor or of a collection, and anything else as it is."""
    return a.detach().clone() if isinstance(a, Tensor) else copy(a) if isinstance(a, dict | list | set) else a
