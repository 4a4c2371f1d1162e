"""What fastlstm gains over torch: sequences, single steps, GRUs, own cells and int8 on a CPU, and layers on a GPU.

pytest benchmarks/ --benchmark-only

`benchmarks.shared.clock` does the timing: both sides in turns, on a settled machine. On a GPU `benchmarks.gpu.layers`
does it. Every row is visited twice, with modules and tensors made anew. So its interval also holds what changes
from minute to minute, and from one place in memory to another. A row without a result, since its rounds scatter or
other processes worked beside a visit, gets a third visit. pytest-benchmark only keeps the times, and conftest.py
prints the table. `make bench` measures a whole grid, and `python -m benchmarks.gpu` all that is to know of a GPU.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import pytest
import torch

from benchmarks.cpu import int8, norms_and_heads, steps
from benchmarks.gpu import layers
from benchmarks.shared import machine
from benchmarks.shared.calls import check
from benchmarks.shared.clock import Run, Side, compare
from benchmarks.shared.contest import Contest
from benchmarks.shared.shapes import MODES, SOME, Shape
from benchmarks.shared.tables import ZEROS
from fastlstm.backends import dispatch

VISITS = 2  # of a row, between which all others are visited; a row that has no result then is visited once more
ROUNDS, SECONDS = 10, 1.5  # of a visit: rounds, unless they take longer
GRUS = (Shape(28, 128, 28, 128, cell="GRU"), Shape(128, 64, 256, 256, cell="GRU"))
CELLS = ((1, 128, 512), (32, 128, 256))  # B, I, H
BY_THE_CLOCK = functools.partial(compare, rounds=ROUNDS, limit=SECONDS)


class Replay:
    """A clock for pytest-benchmark that goes on by what has been measured, and by nothing else."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def report(self, benchmark, seconds: list[float]) -> None:
        """Have the fixture `benchmark`, whose timer this is, report `seconds`."""
        left = iter(seconds)

        def call() -> None:
            self.now += next(left)

        benchmark.pedantic(call, rounds=len(seconds))


REPLAY = Replay()


def of_layer(shape: Shape, mode: str, on_gpu: bool = False) -> dict[str, Run]:
    device = torch.device(layers.DEVICE)
    if on_gpu and (reason := dispatch.module("triton").supports(device, torch.bfloat16)) is not None:
        pytest.skip(reason)  # before anything is computed
    contest = layers.contest_of(shape, "bf16") if on_gpu else Contest(shape)
    contest.check()
    return {"torch": contest.run(contest.theirs, mode), "fastlstm": contest.run("fastlstm", mode)}


def of_own_cell(mode: str) -> dict[str, Run]:
    _, runs = next(norms_and_heads.norms())
    check(runs["fastlstm"]["training"](), runs["torch"]["training"](), norms_and_heads.TOLERANCE)
    return {name: runs[name][mode] for name in ("torch", "fastlstm")}


def of_int8(mode: str) -> dict[str, Run]:
    _, runs = int8.contenders(1, 512, 512)
    return {"torch": runs["nn.LSTM"], "fastlstm": runs["int8"]}


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    runs: Callable[[str], dict[str, Run]]  # "torch" and "fastlstm" by mode, checked
    modes: tuple[str, ...] = MODES
    note: str = ""
    times: Callable[[dict[str, Run]], dict[str, Side]] = BY_THE_CLOCK


CASES = [
    *(Case("sequences", str(shape), functools.partial(of_layer, shape)) for shape in SOME if shape.T > 1),
    *(Case("steps", f"cell-B{B}-I{I}-H{H}", functools.partial(steps.runs, B, I, H)) for B, I, H in CELLS),
    *(Case("steps", str(s), functools.partial(of_layer, s), note=ZEROS) for s in SOME if s.T == 1),
    *(Case("GRU", str(shape), functools.partial(of_layer, shape)) for shape in GRUS),
    Case("own cells", "LSTM with norms, T28-B128-I28-H128", of_own_cell),
    Case("int8", "int8 beside float32, T477-B1-I512-H512", of_int8, modes=MODES[:1]),
]
if torch.cuda.is_available():
    on_gpu = {"times": functools.partial(layers.times, way="eager", rounds=ROUNDS)}
    group = f"{torch.cuda.get_device_name()}, bf16"
    CASES += [
        Case(group, f"GPU {shape}", functools.partial(of_layer, shape, on_gpu=True), **on_gpu)
        for shape in layers.SHAPES
    ]


@dataclass
class Row:
    """What the visits of a row have measured so far."""

    quiet: list[dict[str, Side]] = field(default_factory=list)  # visits beside which no other process worked
    busy: list[dict[str, Side]] = field(default_factory=list)

    def side(self, name: str) -> Side:
        """Return the times of all quiet visits, or of all if none was, with the thread count of the last."""
        visits = self.quiet or self.busy
        return Side([seconds for visit in visits for seconds in visit[name].times], visits[-1][name].threads)

    @property
    def noisy(self) -> bool:
        return len(self.quiet) < VISITS or self.side("fastlstm").to(self.side("torch")).noisy


ROWS: defaultdict[tuple[Case, str], Row] = defaultdict(Row)


def record(benchmark, case: Case, mode: str, row: Row) -> None:
    """Keep what conftest.py prints and `benchmarks.change` reads, of which a row's last visit counts."""
    ours, theirs = row.side("fastlstm"), row.side("torch")
    ratio = ours.to(theirs)
    REPLAY.report(benchmark, ours.times)
    benchmark.extra_info |= {
        "group": case.group,
        "name": case.name,
        "mode": mode,
        "note": case.note,
        "ratio to nn.LSTM": asdict(ratio),
        "noisy": row.noisy,
        "seconds": ours.seconds,
        "nn.LSTM seconds": theirs.seconds,
        "threads": ours.threads,
        "nn.LSTM threads": theirs.threads,
    }


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(
    ("case", "mode"), [pytest.param(case, mode, id=f"{case.name}-{mode}") for case in CASES for mode in case.modes]
)
@pytest.mark.parametrize("visit", range(1, VISITS + 2))  # the lowest decorator's parameter changes least often
def test_speed(benchmark, case, mode, visit):
    row = ROWS[case, mode]
    if visit > VISITS and not row.noisy:
        pytest.skip("the row has a result")
    runs, others = case.runs(mode), machine.Others()
    sides = case.times(runs)
    (row.busy if others.processors() > machine.BUSY else row.quiet).append(sides)
    record(benchmark, case, mode, row)
