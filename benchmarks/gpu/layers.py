"""A layer on a GPU beside torch's own and TorchRL's: checked, then timed by CUDA events.

The L2 cache is flushed before each call. An eager call begins after the flush, so that the host's time counts. The
replay of a graph is queued behind the flush, so that its time is the device's alone.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict
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
TORCHRL = importlib.util.find_spec("torchrl") is not None
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


def contest_of(shape: Shape, precision: str, beside_torchrl: bool = False) -> Contest:
    """Return the layer in torch's setting of a precision, which the backend follows."""
    set_precision(precision)
    contest = Contest(shape, precision, DEVICE, backend="triton")
    if beside_torchrl:
        contest.modules["torchrl"] = TorchRL(deepcopy(contest.modules["nn.LSTM"]), precision)
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


def times(runs: Mapping[str, Run], way: str, rounds: int) -> dict[str, Side]:
    """Return what each takes eagerly, or as the replay of a graph."""
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

    samples = {name: sampled(run if way == "eager" else graphed(run)) for name, run in runs.items()}
    return {name: Side(values, 1) for name, values in in_turns(samples, rounds, SECONDS).items()}


def rows(item: Item, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield what was measured of an item."""
    contest = contest_of(*item)
    contest.check()
    first, second = (contest.results(contest.modules["fastlstm"]) for _ in range(2))
    same_bits = all(map(torch.equal, first.values(), second.values()))
    for way in WAYS:
        for mode in MODES:
            sides = times({name: contest.run(name, mode) for name in contest.modules}, way, rounds)
            ours = sides["fastlstm"]
            yield {
                **described(item), "mode": mode, "way": way, "same_bits": same_bits,
                "seconds": {name: side.seconds for name, side in sides.items()}, "errors": contest.errors,
                "microseconds_a_step": 1e6 * ours.seconds / item[0].T,
                "ratios": {name: asdict(ours.to(side)) for name, side in sides.items() if side is not ours},
            }  # fmt: skip


def measure(item: Item, rounds: int) -> list[dict[str, Any]]:
    """Return an item's rows, and after them the error that ended them. A failed capture of a graph ends them too, since
    torch's allocator may still be in it.
    """
    measured = []
    try:
        for row in rows(item, rounds):
            measured.append(row)
    except Exception as error:
        measured.append(described(item) | {"failed": f"{type(error).__name__}: {error}"[:500]})
    return measured


def described(item: Item) -> dict[str, Any]:
    return {"name": str(item[0]), "precision": item[1], "beside_torchrl": item[2]}


def compile_kernels(item: Item) -> None:
    """Run ours once, so that its kernels lie in Triton's cache."""
    contest = contest_of(*item[:2])
    for mode in MODES:
        contest.run("fastlstm", mode)()
