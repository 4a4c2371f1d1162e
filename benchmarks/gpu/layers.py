"""A layer on a GPU beside torch's own and TorchRL's: checked, then timed by CUDA events.

The L2 cache is flushed before each call. An eager call begins after the flush, so that the host's time counts. The
replay of a graph is queued behind the flush, so that its time is the device's alone.
"""

import importlib.util
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shared.clock import Run, Side, in_turns
from benchmarks.shared.contest import PRECISIONS, Contest
from benchmarks.shared.shapes import MODES, Shape

ROW, BEST_OF_CUDNN = Shape(28, 128, 28, 128), Shape(128, 128, 512, 512)  # fp16, I and H multiples of 128
SMALLEST, *LARGER = (Shape(512, 64, H, H) for H in (64, 128, 256, 512, 1024))
SHAPES = (ROW, Shape(1024, 16, 768, 768), LARGER[0], BEST_OF_CUDNN, SMALLEST, *LARGER[1:])
GRUS = (Shape(28, 128, 28, 128, cell="GRU"), Shape(512, 64, 256, 256, cell="GRU"))
WAYS = ("eager", "graph")
DEVICE = "cuda"
WARM_UP, SECONDS = 3, 3.0  # calls; a measurement ends after so long
FLUSH = 256 * 2**20  # bytes, several times the L2 cache
Item = tuple[Shape, str, bool]  # and its precision, and whether TorchRL runs beside it


class TorchRL(nn.Module):
    """The kernel behind torchrl.modules.LSTMModule(recurrent_backend="triton"), without the module's tensordict."""

    batch_first = True

    def __init__(self, lstm: nn.LSTM, precision: str) -> None:
        super().__init__()
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        self.lstm, self.run = lstm, lstm_triton
        self.products = {"ieee": "tf32x3", "tf32": "tf32"}.get(precision, "ieee")  # ieee goes past the matrix unit

    def forward(self, x: Tensor) -> Any:
        states = x.new_zeros(*x.shape[:2], self.lstm.hidden_size)  # at every step, read where a flag resets
        flags = x.new_zeros(x.shape[:2], dtype=torch.bool)
        options = {"compute_dtype": x.dtype, "input_precision": self.products}
        return self.run(x, states, states, *self.lstm.all_weights[0], flags, **options)


def set_precision(name: str) -> None:
    """By torch's older names: once the newer ones are set, torch refuses to read the older, as TorchRL does."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = PRECISIONS[name].tf32


def contest_of(shape: Shape, precision: str, beside_torchrl: bool = False, check: bool = True) -> Contest:
    """Return the layer in torch's setting of a precision, which the backend follows."""
    set_precision(precision)
    contest = Contest(shape, precision, DEVICE, backend="triton")
    if beside_torchrl and importlib.util.find_spec("torchrl") is None:
        contest.left_out["torchrl"] = "the package torchrl is not installed"
    elif beside_torchrl:
        contest.modules["torchrl"] = TorchRL(deepcopy(contest.modules["nn.LSTM"]), precision)
        contest.rivals.add("torchrl")
    if check:
        contest.check()
    return contest


def graphed(run: Run) -> Run:
    """Return the replay of a call. The current stream stays the same: torch's context leaves the capture's stream
    current where the capture fails.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        run()
    return graph.replay


def calls(contest: Contest, mode: str, way: str) -> dict[str, Run]:
    """Return what can run so by name. After a failed capture no other is tried: torch's allocator may still be in it.
    Ours therefore comes first, and raises.
    """
    runs: dict[str, Run] = {}
    for name in sorted(contest.modules, key=lambda name: name != "fastlstm"):
        run = contest.run(name, mode)
        try:
            runs[name] = run if way == "eager" else graphed(run)
        except Exception as problem:
            if name == "fastlstm":
                raise
            contest.left_out[f"{name} {mode} from a graph, and what follows"] = f"{type(problem).__name__}: {problem}"
            break
    return runs


def times(runs: dict[str, Run], way: str, rounds: int) -> dict[str, Side]:
    flush = torch.empty(FLUSH, dtype=torch.int8, device=DEVICE)

    def sampled(run: Run) -> Callable[[], float]:
        def sample() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            if way == "eager":  # queued behind the flush, a call would hide 90 us of the host's time
                torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        for _ in range(WARM_UP):
            sample()
        return sample

    samples = in_turns({name: sampled(run) for name, run in runs.items()}, rounds, SECONDS)
    return {name: Side(values, 1) for name, values in samples.items()}


def rows(item: Item, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield what was measured of an item, and at last what was left out."""
    shape, precision, _ = item
    contest = contest_of(*item)
    first, second = (contest.results(contest.modules["fastlstm"]) for _ in range(2))
    same_bits = all(map(torch.equal, first.values(), second.values()))
    for way in WAYS:
        for mode in MODES:
            sides = times(calls(contest, mode, way), way, rounds)
            ours = sides["fastlstm"]
            yield {
                "name": str(shape), "precision": precision, "mode": mode, "way": way, "same_bits": same_bits,
                "seconds": {name: side.seconds for name, side in sides.items()}, "errors": contest.errors,
                "microseconds_a_step": 1e6 * ours.seconds / shape.T,
                "ratios": {name: asdict(ours.to(side)) for name, side in sides.items() if side is not ours},
            }  # fmt: skip
    if contest.left_out:
        yield {"name": str(shape), "precision": precision, "left_out": contest.left_out}


def measure(send: Connection, item: Item, rounds: int) -> None:
    """Send what was measured of an item, from a process of its own."""
    for row in rows(item, rounds):
        send.send(row)


def compile_kernels(item: Item) -> None:
    """Run ours once, so that its kernels lie in Triton's cache."""
    contest = contest_of(*item[:2], check=False)
    for mode in MODES:
        contest.run("fastlstm", mode)()
