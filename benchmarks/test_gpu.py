"""fastlstm.LSTM on a GPU beside torch.nn.LSTM, a compiled loop and what other kernels are installed.

pytest benchmarks/ --benchmark-only

`gpu_layers`, which `benchmarks.gpu` runs too, does the timing: CUDA events, a flushed cache, contenders interleaved.
pytest-benchmark only reports it. Without a GPU conftest.py leaves this file out.
"""

import functools

import pytest
import torch

from benchmarks import gpu_layers
from benchmarks.clock import REPLAY
from benchmarks.gpu_rivals import RIVALS
from benchmarks.shapes import MODES, Shape

ROUNDS = 31
LONGEST_LOOP = 128  # time steps that torch.compile takes: it unrolls them


@functools.lru_cache(maxsize=1)
def checked(shape: Shape, precision: str) -> gpu_layers.Bench:
    names = [name for name in RIVALS if name != "torch.compile" or shape.T <= LONGEST_LOOP]
    bench = gpu_layers.Bench(shape, precision, "cuda", names)
    bench.check()
    return bench


@functools.lru_cache(maxsize=1)
def measured(shape: Shape, precision: str, mode: str, way: str) -> dict[str, list[float]]:
    bench = checked(shape, precision)
    gpu_layers.set_precision(precision)
    return bench.times(mode, way, ROUNDS)


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("implementation", ["nn.LSTM", "fastlstm", *RIVALS])
@pytest.mark.parametrize("way", gpu_layers.WAYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", gpu_layers.PRECISIONS)
@pytest.mark.parametrize("shape", gpu_layers.SHAPES, ids=str)
def test_lstm_on_a_gpu(benchmark, shape, precision, mode, way, implementation):
    times, bench = measured(shape, precision, mode, way), checked(shape, precision)
    if implementation not in times:
        reasons = (bench.left_out.get(key) for key in (implementation, f"{implementation} {mode} from a graph"))
        pytest.skip(next(filter(None, reasons), f"it would unroll more than {LONGEST_LOOP} time steps"))
    benchmark.group = f"{torch.cuda.get_device_name()} {shape} {mode} {precision} {way}"
    REPLAY.report(benchmark, times[implementation])
    row = bench.row(mode, way, times)
    benchmark.extra_info |= {key: row[key] for key in ("shape", "mode", "precision", "way", "errors", "ratios")}
    benchmark.extra_info["seconds"] = row["seconds"][implementation]
