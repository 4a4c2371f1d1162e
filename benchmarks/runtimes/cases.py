"""What the runtimes compute: a layer's sizes and mode, its weights and inputs, and the results that torch gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.shared.shapes import GATES, Shape

# No torch here, and none in the processes of runtimes that do without it.

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-4  # of outputs below 1, of a loss, and of gradients beside the largest: what float32 keeps with room


class Unsupported(Exception):
    """Raised by a contender that cannot run a case."""


class Contender(NamedTuple):
    """A case, ready to run in one runtime."""

    call: Callable[[], object]
    results: Callable[[], list[np.ndarray]]  # the output (T, B, D H), or of a training step the loss and dweight_hh


@dataclass(frozen=True)
class LayerCase:
    """A layer and what is done with it.

    Attributes:
        mode: "inference" of a whole sequence from a state of zeros; "step", which takes a state and returns one;
            "training", the mean squared error with its gradients of all weights.
        shape: the sizes, and the cell.
        arrays: the weights by torch's names, x (T, B, I), the states h and c (1, B, H) of a step, target (T, B, D H) of
            a training step, and the expected output, loss and dweight_hh.
    """

    mode: str
    shape: Shape
    arrays: Arrays

    @property
    def gates(self) -> int:
        return GATES[self.shape.cell]

    @property
    def state_names(self) -> list[str]:
        return [name for name in ("h", "c") if name in self.arrays]

    @property
    def states(self) -> list[np.ndarray]:
        """The states (1, B, H) before a step; none in other modes."""
        return [self.arrays[name] for name in self.state_names]

    def weights(self, layer: int = 0, direction: int = 0, order: tuple[int, ...] | None = None) -> list[np.ndarray]:
        """Return weight_ih, weight_hh, bias_ih and bias_hh, with their gates in another order than torch's."""
        suffix = f"l{layer}" + "_reverse" * direction
        arrays = [self.arrays[f"{name}_{suffix}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return arrays if order is None else [self.reordered(a, order) for a in arrays]

    def reordered(self, a: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
        blocks = np.split(a, self.gates)
        return np.concatenate([blocks[k] for k in order])

    def compare(self, name: str, results: list[np.ndarray], tolerance: float = TOLERANCE) -> None:
        """Raise where the results of a contender are not the expected ones."""
        error = self.error(results)
        if not error <= tolerance:  # NaN is an error too
            raise AssertionError(f"{name}: {self.mode} of {self.shape} errs by {error:.1e}")

    def error(self, results: list[np.ndarray]) -> float:
        """Return the largest difference from what is expected; of a gradient relative to its largest value."""
        if self.mode != "training":
            return float(np.abs(results[0] - self.arrays["output"]).max())
        loss, gradient = (self.arrays[name] for name in ("loss", "dweight_hh"))
        of_gradient = np.abs(results[1] - gradient).max() / np.abs(gradient).max()
        return float(max(abs(results[0] - loss), of_gradient))


def make(mode: str, shape: Shape) -> LayerCase:
    """Return a case with weights and inputs of torch, and its results."""
    import torch

    torch.manual_seed(0)
    module = shape.module(torch.nn)
    x, target = torch.randn(shape.T, shape.B, shape.I), torch.randn(shape.T, shape.B, shape.directions * shape.H)
    arrays: dict[str, Any] = {"x": x, **module.state_dict()}
    if mode == "step":
        arrays |= {name: 0.3 * torch.randn(1, shape.B, shape.H) for name in ("h", "c")[: GATES[shape.cell] - 2]}
    states = tuple(arrays[name] for name in ("h", "c") if name in arrays)
    arrays["output"], _ = module(x, states if len(states) > 1 else states[0] if states else None)
    if mode == "training":
        loss = torch.nn.functional.mse_loss(arrays["output"], target)
        loss.backward()
        arrays |= {"target": target, "loss": loss, "dweight_hh": module.weight_hh_l0.grad}
    return LayerCase(mode, shape, {name: a.detach().numpy() for name, a in arrays.items()})


def torch_module(case: LayerCase, package: Any = None) -> Any:
    """Return the layer of torch.nn, or of another package with such a layer, with the weights of a case."""
    import torch

    module = case.shape.module(package or torch.nn)
    module.load_state_dict({name: torch.from_numpy(case.arrays[name]) for name, _ in module.named_parameters()})
    return module
