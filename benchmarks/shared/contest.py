"""One layer: torch's module and fastlstm's with the same weights and inputs, and the check that they agree."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fastlstm
from benchmarks.shared.calls import OURS, called
from benchmarks.shared.shapes import MODES, Shape


@dataclass(frozen=True)
class Precision:
    dtype: torch.dtype
    limit: float  # the largest error, relative to the largest value, unless torch's own is a third of it or more
    tf32: bool = False  # whether a GPU's float32 products may be in it


PRECISIONS = {
    "float32": Precision(torch.float32, 1e-6),
    "bfloat16": Precision(torch.bfloat16, 1e-6),
    "tf32": Precision(torch.float32, 3e-3, tf32=True),
    "ieee": Precision(torch.float32, 2e-5),
    "bf16": Precision(torch.bfloat16, 8e-2),
    "fp16": Precision(torch.float16, 1e-2),
}
ROUNDED = {"numba-bf16": 8e-2, "numba-bf16x3": 3.2e-4}  # the limits of backends that round float32


def twins(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """Return torch's layer and ours with the same weights."""
    theirs, ours = shape.module(nn), shape.module(fastlstm)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


class Contest:
    """A layer's modules by name: "nn.LSTM" or "nn.GRU", "fastlstm", and what a caller adds.

    Args:
        shape: the layer.
        precision: a name of `PRECISIONS`. "tf32" and "ieee" need torch's settings, which this leaves alone.
        device: where the modules and the inputs lie.
        backend: that of "fastlstm"; the default one without it.
    """

    def __init__(
        self, shape: Shape, precision: str = "float32", device: str = "cpu", backend: str | None = None
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.theirs, dtype = shape, f"nn.{shape.cell}", PRECISIONS[precision].dtype
        self.limit = ROUNDED.get(backend or "", PRECISIONS[precision].limit)
        self.modules: dict[str, nn.Module] = {self.theirs: shape.module(nn).to(device, dtype)}
        self.add(OURS, shape.module(fastlstm, backend=backend).to(device, dtype))
        # what 16 bits hold exactly, where there are such
        self.x = torch.randn(shape.T, shape.B, shape.I).to(device, dtype)
        self.doutput = torch.randn(shape.T, shape.B, shape.directions * (shape.P or shape.H)).to(device, dtype)
        self.errors: dict[str, float] = {}  # the largest of each module, relative to the largest value

    def add(self, name: str, module: nn.Module) -> None:
        """Give a module the weights of torch's, and have it take part by this name."""
        module.load_state_dict(self.modules[self.theirs].state_dict())
        self.modules[name] = module

    def inputs(self, module: nn.Module) -> list[Tensor]:
        """Return x and doutput as a module takes them."""
        dtype = next(module.parameters()).dtype
        both = (a.transpose(0, 1) if getattr(module, "batch_first", False) else a for a in (self.x, self.doutput))
        return [a.to(dtype).contiguous() for a in both]

    def run(self, name: str, mode: str) -> Callable[[], object]:
        module = self.modules[name].train(mode == "training")
        x, doutput = self.inputs(module)
        return called(mode, lambda: module(x)[0], module.parameters(), doutput)

    def runs(self, mode: str) -> dict[str, Callable[[], object]]:
        """Return what runs in a mode, results compared. Torch's has the name "torch"."""
        self.check()
        names = {OURS: OURS, "torch": self.theirs} | {name: name for name in self.modules if name != self.theirs}
        return {name: self.run(module, mode) for name, module in names.items()}

    def results(self, module: nn.Module) -> dict[str, Tensor]:
        """Return outputs and states of both kinds of calls, and the gradients, time first."""
        x, doutput = self.inputs(module)
        named: dict[str, Tensor] = {}
        for mode in MODES:
            with torch.set_grad_enabled(mode == "training"):
                output, *states = pytree.tree_leaves(module.train(mode == "training")(x))
            if mode == "training":
                names = (f"d{name.rpartition('.')[2]}" for name, _ in module.named_parameters())
                named |= zip(names, torch.autograd.grad(output, list(module.parameters()), doutput))
            output = output.transpose(0, 1) if getattr(module, "batch_first", False) else output
            named |= {f"{what} of {mode}": a.detach() for what, a in zip(("output", "h_n", "c_n"), (output, *states))}
        return named

    def check(self) -> None:
        """Compare all with float64, and raise where a module is wrong.

        The largest error of each tensor, relative to its largest value, may be three times that of torch's module, or
        the limit of the precision or the backend.
        """
        want = self.results(copy.deepcopy(self.modules[self.theirs]).double())

        def errors(module: nn.Module) -> dict[str, float]:
            pairs = {name: (a, want[name]) for name, a in self.results(module).items()}
            # the gradient of weight_hh is zero after a single step from a state of zeros
            return {name: ((a - b).abs().max() / (b.abs().max() or 1)).item() for name, (a, b) in pairs.items()}

        theirs = errors(self.modules[self.theirs])
        for name, module in self.modules.items():
            for what, error in errors(module).items():
                allowed = max(3 * theirs[what], self.limit)
                if not error <= allowed:  # NaN is an error too
                    raise AssertionError(f"{self.shape}: {what} of {name} errs by {error:.1e}, allowed {allowed:.1e}")
                self.errors[name] = max(error, self.errors.get(name, 0.0))
