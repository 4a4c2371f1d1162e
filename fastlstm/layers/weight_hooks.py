"""Hooks of `torch.nn.utils` that compute a weight before each call of a module: pruning, and the old norms of weights.

Such a hook stands among the forward-pre-hooks of the module, and leaves a plain tensor in the weight's place. What does
not call the module, as `LSTM.step`, would read the tensor of the last call.
"""

from typing import Any

from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# the classes of these hooks, and the functions of `torch.nn.utils` that remove them and keep the weights
REMOVERS: dict[type, str] = {
    BasePruningMethod: "prune.remove",
    WeightNorm: "remove_weight_norm",
    SpectralNorm: "remove_spectral_norm",
}
_CLASSES = tuple(REMOVERS)


def weight_hooks(module: Any) -> list[tuple[int, Any]]:
    """Return the hooks of a module that compute weights, in the order in which they run, each with its key."""
    return [(key, hook) for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _CLASSES)]


def compute_weights(module: Any) -> None:
    """Run the hooks of a module that compute weights, as a call of the module would. They read nothing of its input."""
    for _, hook in weight_hooks(module):
        hook(module, ())
