"""One LSTM layer with int8 weights against our float32, and ONNX Runtime's int8 where it is installed, on one thread.

python -m benchmarks.int8 [--rounds 41] [--shapes 1,128,128 16,256,256]
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

import fastlstm
from benchmarks.clock import ratio_of
from benchmarks.rivals import onnx_model, onnxruntime_run
from benchmarks.shapes import Shape

SHAPES = "1,128,128", "1,512,512", "1,1024,1024", "16,256,256", "64,256,256", "128,28,128"
WORK = 1e9  # multiply-adds of a call, which say how many steps it has
MOST_STEPS = 1000


def onnxruntime_int8(lstm: nn.LSTM, shape: Shape, x: Tensor) -> Callable[[], object]:
    """DynamicQuantizeLSTM, with a scale for each weight row."""
    from onnx import load_from_string
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        options = {"op_types_to_quantize": ["LSTM"], "per_channel": True, "weight_type": QuantType.QInt8}
        quantize_dynamic(load_from_string(onnx_model(lstm, shape)), path, **options)
        model = path.read_bytes()
    if b"DynamicQuantizeLSTM" not in model:
        raise RuntimeError("ONNX Runtime has left the LSTM as it was")
    return onnxruntime_run(model, x, 1)


def contenders(B: int, I: int, H: int) -> tuple[int, dict[str, Callable[[], object]]]:
    """The number of steps of a call, and what runs it."""
    torch.manual_seed(0)
    T = max(4, min(MOST_STEPS, round(WORK / (B * 4 * H * (I + H)))))
    theirs, x = nn.LSTM(I, H), torch.randn(T, B, I)
    ours = fastlstm.LSTM.from_torch(theirs)
    modules = {
        "float32": ours,
        "int8": fastlstm.quantize(deepcopy(ours)),
        "int16": fastlstm.quantize(deepcopy(ours), "int16"),
    }
    for module in modules.values():
        torch.testing.assert_close(module(x)[0], ours(x)[0], rtol=0, atol=2e-2)
    calls: dict[str, Callable[[], object]] = {name: lambda m=module: m(x) for name, module in modules.items()}
    if importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxruntime"):
        calls["ONNX Runtime int8"] = onnxruntime_int8(theirs, Shape(T, B, I, H), x)
    return T, calls


def taken(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time that each call takes, in rounds in which all run in turns. Other work on the machine
    counts less in it than in the time on the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(2 + rounds):
        for name, run in calls.items():
            start = time.thread_time()
            run()
            if number >= 2:  # the first ones compile, pack and fill caches
                times[name].append(time.thread_time() - start)
    return times


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("us a step: the least, the median, and the ratio of float32's time to it with its 95 % interval\n")
    for text in options.shapes:
        T, calls = contenders(*map(int, text.split(",")))
        times = taken(calls, options.rounds)
        print(f"B, I, H = {text}; T = {T}")
        for name, values in times.items():
            ratio, us = ratio_of(times["float32"], values), [value / T * 1e6 for value in values]
            line = f"  {name:18} {min(us):9.2f} {statistics.median(us):9.2f}"
            print(f"{line}   {ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})", flush=True)


if __name__ == "__main__":
    main()
