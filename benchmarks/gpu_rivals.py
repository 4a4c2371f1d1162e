"""What a GPU's LSTM is timed beside, each as a module over the parameters of an nn.LSTM: other packages' kernels.

A rival takes `x` as its own kernel wants it, batch first where it says so. `rivals` builds those that are installed and
can run a shape, and says why the others do not.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.shapes import Shape


class Rival(nn.Module):
    batch_first = False

    def __init__(self, lstm: nn.LSTM, precision: str) -> None:
        super().__init__()
        self.lstm, self.precision = lstm, precision

    @staticmethod
    def reason(shape: Shape, precision: str) -> str | None:
        """Why it cannot run this, or None."""
        return None


class Compiled(Rival):
    """The layer as a loop of torch operations, compiled: what somebody without a kernel would write."""

    def __init__(self, lstm: nn.LSTM, precision: str) -> None:
        super().__init__(lstm, precision)
        self.run = torch.compile(self.loop)

    def loop(self, x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = self.lstm.all_weights[0]
        preact = linear(x, w_ih, b_ih + b_hh)
        h = c = x.new_zeros(x.shape[1], w_hh.shape[1])
        outputs = []
        for t in range(x.shape[0]):
            i, f, g, o = (preact[t] + linear(h, w_hh)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs)

    def forward(self, x: Tensor) -> Any:
        return (self.run(x),)


class TorchRL(Rival):
    """The kernel behind torchrl.modules.LSTMModule(recurrent_backend="triton"), without the module's tensordict."""

    batch_first = True

    def __init__(self, lstm: nn.LSTM, precision: str) -> None:
        super().__init__(lstm, precision)
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        self.run: Callable[..., Any] = lstm_triton
        self.first: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Any:
        B, T, _ = x.shape
        if self.first is None:  # states at every step, read where a flag resets
            self.first = x.new_zeros(B, T, self.lstm.hidden_size), x.new_zeros(B, T, dtype=torch.bool)
        states, flags = self.first
        precision = {"ieee": "tf32x3", "tf32": "tf32"}.get(self.precision, "ieee")  # ieee goes past the matrix unit
        options = {"compute_dtype": x.dtype, "input_precision": precision}
        return self.run(x, states, states, *self.lstm.all_weights[0], flags, **options)


class FlashRNN(Rival):
    """FlashRNN's fused Triton kernels. Those in CUDA are compiled for each shape, for minutes: not here."""

    batch_first = True
    backend = "triton_fused"

    def __init__(self, lstm: nn.LSTM, precision: str) -> None:
        super().__init__(lstm, precision)
        from flashrnn import flashrnn

        self.run: Callable[..., Any] = flashrnn

    @staticmethod
    def reason(shape: Shape, precision: str) -> str | None:
        if shape.H not in (16, 32, 64):
            return f"its fused Triton kernels take 16, 32 or 64 hidden units, not {shape.H}"
        return "its float32 products are in tf32" if precision == "ieee" else None

    def forward(self, x: Tensor) -> Any:
        (B, T, _), H = x.shape, self.lstm.hidden_size
        w_ih, w_hh, b_ih, b_hh = self.lstm.all_weights[0]
        preact = linear(x, w_ih, b_ih).view(B, T, 4, 1, H)
        dtype = str(x.dtype).removeprefix("torch.")
        states, _ = self.run(
            preact, w_hh.view(4, 1, H, H), b_hh.view(4, 1, H), function="lstm", backend=self.backend, dtype=dtype
        )
        return (states[0].squeeze(2),)  # of h and c; one head


RIVALS: dict[str, tuple[str, type[Rival]]] = {  # and the package that each needs
    "torch.compile": ("torch", Compiled),
    "torchrl": ("torchrl", TorchRL),
    "flashrnn": ("flashrnn", FlashRNN),
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(RIVALS[name][0]) is not None


def rivals(
    lstm: nn.LSTM, shape: Shape, precision: str, names: list[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Modules of `lstm`'s weights, not shared with it, and the reasons of those left out."""
    found: dict[str, nn.Module] = {}
    left_out = {}
    for name in names:
        package, rival = RIVALS[name]
        reason = rival.reason(shape, precision)
        if not installed(name):
            reason = f"the package {package} is not installed"
        if reason is None:
            twin = nn.LSTM(shape.I, shape.H)
            twin.load_state_dict(lstm.state_dict())
            try:
                found[name] = rival(twin, precision)
            except Exception as error:  # a version that has moved on
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            left_out[name] = reason
    return found, left_out
