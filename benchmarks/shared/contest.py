"""One layer: torch's module and fastlstm's with the same weights and inputs, and the check that they agree."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fastlstm
from benchmarks.shared.calls import called
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


class Contest:
    """A layer's modules by name: "nn.LSTM" or "nn.GRU", "fastlstm", and what else there is.

    Args:
        shape: the layer.
        precision: a name of `PRECISIONS`. "tf32" and "ieee" need torch's settings, which this leaves alone.
        device: where the modules and the inputs lie.
        backend: that of "fastlstm"; the default one without it.
        beside: names of backends that run beside it. Beside "bfloat16" fastlstm's own float32 runs too.
        null: puts torch's module in fastlstm's place. What the clock then shows is its own error.
    """

    def __init__(
        self,
        shape: Shape,
        precision: str = "float32",
        device: str = "cpu",
        backend: str | None = None,
        beside: Sequence[str] = (),
        seed: int = 0,
        null: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.shape, self.precision, self.theirs = shape, precision, f"nn.{shape.cell}"
        dtype = PRECISIONS[precision].dtype
        sizes, options = (shape.I, shape.H, shape.layers), {"bidirectional": shape.bidirectional}
        options |= {"proj_size": shape.P} if shape.P else {}
        theirs, ours = getattr(nn, shape.cell), getattr(fastlstm, shape.cell)
        first = theirs(*sizes, **options)
        named = {"fastlstm": theirs(*sizes, **options) if null else ours(*sizes, backend=backend, **options)}
        named |= {name: ours(*sizes, backend=name, **options) for name in beside}
        self.modules = {self.theirs: first.to(device, dtype)}
        if precision == "bfloat16":
            self.modules["float32"] = ours(*sizes, **options).to(device)
        self.modules |= {name: module.to(device, dtype) for name, module in named.items()}
        for module in self.modules.values():
            module.load_state_dict(first.state_dict())
        # what 16 bits hold exactly, where there are such
        self.x = torch.randn(shape.T, shape.B, shape.I).to(device, dtype)
        self.doutput = torch.randn(shape.T, shape.B, shape.directions * (shape.P or shape.H)).to(device, dtype)
        self.errors: dict[str, float] = {}  # the largest of each module, relative to the largest value

    def inputs(self, module: nn.Module) -> list[Tensor]:
        """Return x and doutput as a module takes them."""
        dtype = next(module.parameters()).dtype
        both = (a.transpose(0, 1) if getattr(module, "batch_first", False) else a for a in (self.x, self.doutput))
        return [a.to(dtype).contiguous() for a in both]

    def run(self, name: str, mode: str) -> Callable[[], object]:
        module = self.modules[name].train(mode == "training")
        x, doutput = self.inputs(module)
        return called(mode, lambda: module(x)[0], module.parameters(), doutput)

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
        the precision's limit.
        """
        want = self.results(copy.deepcopy(self.modules[self.theirs]).double())

        def errors(module: nn.Module) -> dict[str, float]:
            pairs = {name: (a, want[name]) for name, a in self.results(module).items()}
            # the gradient of weight_hh is zero after a single step from a state of zeros
            return {name: ((a - b).abs().max() / (b.abs().max() or 1)).item() for name, (a, b) in pairs.items()}

        theirs = errors(self.modules[self.theirs])
        for name, module in self.modules.items():
            limit = ROUNDED.get(name, PRECISIONS[self.precision].limit)
            for what, error in errors(module).items():
                allowed = max(3 * theirs[what], limit)
                if not error <= allowed:  # NaN is an error too
                    raise AssertionError(f"{self.shape}: {what} of {name} errs by {error:.1e}, allowed {allowed:.1e}")
                self.errors[name] = max(error, self.errors.get(name, 0.0))
