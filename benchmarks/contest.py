"""One shape: torch.nn.LSTM and fastlstm.LSTM with the same weights and inputs, and the check that they agree."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.shapes import Shape

# Errors that precisions may have, of outputs and of the largest gradient
ROUNDED = {"numba-bf16": (4e-2, 8e-2), "numba-bf16x3": (1.6e-4, 3.2e-4)}


def inference(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    module.eval()

    def run() -> Any:
        with torch.no_grad():
            return module(x)

    return run


def training(module: nn.Module, x: Tensor, doutput: Tensor) -> Callable[[], object]:
    """Forward and backward to every parameter, with fresh gradients as after zero_grad; x needs none."""
    module.train()
    parameters = list(module.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        module(x)[0].backward(doutput)

    return run


class Contest:
    def __init__(
        self,
        shape: Shape,
        seed: int = 0,
        null: bool = False,
        backends: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
    ):
        """`null` puts nn.LSTM in our place: what the clock then shows is its own error. `backends`, by name, run beside
        the one that runs where none is named. Beside 16 bits runs our own float32.
        """
        torch.manual_seed(seed)
        self.shape = shape
        sizes = shape.I, shape.H, shape.layers
        ours = nn.LSTM if null else fastlstm.LSTM
        self.baseline = nn.LSTM(*sizes, bidirectional=shape.bidirectional)
        self.ours: nn.Module = ours(*sizes, bidirectional=shape.bidirectional)
        self.backends: dict[str, nn.Module] = {
            name: fastlstm.LSTM(*sizes, bidirectional=shape.bidirectional, backend=name) for name in backends
        }
        for module in (self.ours, *self.backends.values()):
            module.load_state_dict(self.baseline.state_dict())
        for module in (self.baseline, self.ours, *self.backends.values()):
            module.to(dtype)
        if dtype != torch.float32:
            self.backends["float32"] = fastlstm.LSTM(*sizes, bidirectional=shape.bidirectional)
            self.backends["float32"].load_state_dict(self.baseline.state_dict())
        # what 16 bits hold exactly, where there are such
        self.x = torch.randn(shape.T, shape.B, shape.I).to(dtype)
        self.doutput = torch.randn(shape.T, shape.B, shape.directions * shape.H).to(dtype)

    def run(self, module: nn.Module, mode: str) -> Callable[[], object]:
        dtype = next(module.parameters()).dtype
        x, doutput = self.x.to(dtype), self.doutput.to(dtype)
        return inference(module, x) if mode == "inference" else training(module, x, doutput)

    def check(self) -> None:
        """Outputs and gradients against float64: at most three times nn.LSTM's own error, or a fixed floor."""
        exact, theirs = self._results(copy.deepcopy(self.baseline).double()), self._results(self.baseline)
        for backend, module in (("", self.ours), *self.backends.items()):
            ours, floors = self._results(module), ROUNDED.get(backend, (5e-7, 1e-6))
            for name, value in exact.items():
                floor = floors[1] * value.abs().max().item() if name.startswith("d") else floors[0]
                limit = max(3 * (theirs[name] - value).abs().max().item(), floor)
                error = (ours[name] - value).abs().max().item()
                if not error <= limit:  # NaN is an error too
                    raise AssertionError(f"{self.shape}: {name} is {error:.1e} from float64, allowed {limit:.1e}")

    def _results(self, module: nn.Module) -> dict[str, Tensor]:
        dtype = next(module.parameters()).dtype
        x, doutput = self.x.to(dtype), self.doutput.to(dtype)
        output, (h_n, c_n) = inference(module, x)()
        results = {"output of inference": output, "h_n of inference": h_n, "c_n of inference": c_n}
        module.train()
        output, (h_n, c_n) = module(x)
        gradients = torch.autograd.grad(output, list(module.parameters()), doutput)
        results |= {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
        return results | {
            f"d{name}": grad for (name, _), grad in zip(module.named_parameters(), gradients, strict=True)
        }
