"""What a GPU's LSTM is held against: what it is timed beside, each as a module over the parameters of an nn.LSTM, and
the goals that its times have.

A rival takes `x` as its own kernel wants it, batch first where it says so. `rivals` builds those that are installed and
can run a shape, and says why the others do not.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.shapes import MODES, Shape

Layer = tuple[Shape, str]  # and its precision
ROW, BEST_OF_CUDNN = Shape(28, 128, 28, 128), Shape(128, 128, 512, 512)
SMALLEST, *LARGER = (Shape(512, 64, H, H) for H in (64, 128, 256, 512, 1024))
# The layers that have goals, in the order in which they are measured: the widest is likeliest to miss them
WIDTHS = [(shape, "bf16") for shape in (LARGER[-1], Shape(1024, 16, 768, 768), SMALLEST, *LARGER[:-1])]
GOALS: list[Layer] = [(ROW, "bf16"), (ROW, "tf32"), (BEST_OF_CUDNN, "fp16"), *WIDTHS]


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


def speeds(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of times, judged by eager calls, in which the host's time counts; those from graphs are shown."""
    beside_torchrl = faster(found, "torchrl", 1.0, GOALS)
    if not installed("torchrl"):
        beside_torchrl = judged(beside_torchrl["goal"], {"torchrl is not installed": None})
    return [
        *(faster(found, "nn.LSTM", 3.0, [layer], ["training"]) for layer in GOALS[:2]),
        quick(found),
        faster(found, "nn.LSTM", 1.0, [(ROW, "bf16"), *WIDTHS]),
        faster(found, "nn.LSTM", 1.0, [(BEST_OF_CUDNN, "fp16")]),
        beside_torchrl,
    ]


def faster(
    found: dict[str, Any], rival: str, least: float, layers: Iterable[Layer], modes: Iterable[str] = MODES
) -> dict[str, Any]:
    facts = {}
    for layer in layers:
        for mode in modes:
            ratios = by_way(found, layer, mode, lambda row: row["ratios"].get(rival, {}).get("median"))
            facts[stated(layer, mode, ratios)] = ratios["eager"] >= least if "eager" in ratios else None
    return judged(f"at least {least} times as fast as {rival}", facts)


def quick(found: dict[str, Any]) -> dict[str, Any]:
    """At T 512: of a short layer's time a step, much is the call's own."""
    layer, mode = (LARGER[0], "bf16"), "inference"
    short, times = (by_way(found, a, mode, lambda row: row["microseconds_a_step"]) for a in (GOALS[0], layer))
    goal = f"forward at most 1 us a step at H 128 and T 512; beside it, {stated(GOALS[0], mode, short)}"
    return judged(goal, {stated(layer, mode, times): times["eager"] <= 1 if "eager" in times else None})


def by_way(found: dict[str, Any], layer: Layer, mode: str, value: Callable[[Any], Any]) -> dict[str, float]:
    """Eager and from a graph: the first measured of each that has a value."""
    rows = [r for r in found["results"] if (r["name"], r["precision"], r["mode"]) == (str(layer[0]), layer[1], mode)]
    return {row["way"]: value(row) for row in reversed(rows) if value(row) is not None}


def stated(layer: Layer, mode: str, values: dict[str, float]) -> str:
    figures = ", ".join(f"{way} {values[way]:.2f}" for way in sorted(values))
    return f"{layer[0]} {layer[1]} {mode} ({figures or 'no time'})"


def judged(goal: str, facts: dict[str, bool | None]) -> dict[str, Any]:
    """By what is known of each part: it holds, does not, or None."""
    verdict = "FAIL" if False in facts.values() else "not measured" if None in facts.values() else "pass"
    return {"goal": goal, "verdict": verdict, "facts": facts}


def told(goal: dict[str, Any]) -> str:
    """On one line, with what decided it."""
    deciding = {"FAIL": False, "not measured": None, "pass": True}[goal["verdict"]]
    facts = ", ".join(name for name, held in goal["facts"].items() if held is deciding)
    return f"{goal['verdict']}: {goal['goal']}: {facts}"
