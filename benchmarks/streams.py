"""The latency of single steps of an LSTM, one row or a few at a time: fastlstm's streams beside what else there is.

python -m benchmarks.streams [--batch 1] [--threads 1] [--calls 20000]

Each contender runs in a process of its own, and blocks of its calls alternate with blocks of the others'. ONNX Runtime
takes part if it is installed. Its threads do not spin, and neither do those of a contender that waits.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastlstm
from benchmarks.rivals import iofc

SIZES = [(40, 128), (128, 128), (512, 512), (1024, 1024)]  # I, H
CONTENDERS = ("stream", "int8 stream", "step", "nn.LSTM", "onnxruntime", "onnxruntime int8")
BLOCK = 500  # calls


def onnx_step(lstm: nn.LSTM, B: int, int8: bool) -> bytes:
    """One step as an ONNX model: x (1, B, I), h and c (1, B, H) to the new h and c."""
    from onnx import TensorProto, helper, numpy_helper

    I, H, value = lstm.input_size, lstm.hidden_size, helper.make_tensor_value_info
    weights = [iofc(getattr(lstm, name))[None].numpy() for name in ("weight_ih_l0", "weight_hh_l0")]
    bias = torch.cat([iofc(lstm.bias_ih_l0), iofc(lstm.bias_hh_l0)])[None].numpy()
    constants = [numpy_helper.from_array(a, name) for a, name in zip([*weights, bias], ("w", "r", "b"))]
    node = helper.make_node("LSTM", ["x", "w", "r", "b", "", "h", "c"], ["", "h_n", "c_n"], hidden_size=H)
    graph = helper.make_graph(
        [node],
        "step",
        [value("x", TensorProto.FLOAT, [1, B, I]), *(value(n, TensorProto.FLOAT, [1, B, H]) for n in "hc")],
        [value(name, TensorProto.FLOAT, [1, B, H]) for name in ("h_n", "c_n")],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "int8.onnx"
            quantize_dynamic(model, target, weight_type=QuantType.QInt8)
            return target.read_bytes()
    return bytes(model.SerializeToString())


def onnxruntime_call(lstm: nn.LSTM, x: torch.Tensor, threads: int, int8: bool) -> Callable[[], object]:
    import onnxruntime

    B, H = x.shape[0], lstm.hidden_size
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(onnx_step(lstm, B, int8), options, providers=["CPUExecutionProvider"])
    feed = {"x": x[None].numpy(), "h": np.zeros((1, B, H), np.float32), "c": np.zeros((1, B, H), np.float32)}

    def call() -> None:
        feed["h"], feed["c"] = session.run(None, feed)

    return call


def contender(name: str, B: int, I: int, H: int, threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    lstm, x = nn.LSTM(I, H), torch.randn(B, I)
    ours, state = fastlstm.LSTM.from_torch(lstm), (torch.zeros(1, B, H), torch.zeros(1, B, H))
    if name.startswith("onnxruntime"):
        return onnxruntime_call(lstm, x, threads, name.endswith("int8"))
    if name.endswith("stream"):
        module: Any = fastlstm.quantize(nn.Sequential(ours))[0] if name.startswith("int8") else ours
        stream = module.stream(B)
        return lambda: stream(x)

    def call() -> None:
        nonlocal state
        with torch.no_grad():
            _, state = ours.step(x, state) if name == "step" else lstm(x[None], state)

    return call


def work(name: str, B: int, I: int, H: int, threads: int) -> None:
    """Serve blocks of calls: for each line of input, the seconds of each call of a block."""
    call = contender(name, B, I, H, threads)
    for _ in sys.stdin:
        times = []
        for _ in range(BLOCK):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


def installed() -> list[str]:
    found = subprocess.run([sys.executable, "-c", "import onnx, onnxruntime"], capture_output=True, check=False)
    return [name for name in CONTENDERS if found.returncode == 0 or not name.startswith("onnxruntime")]


def measure(B: int, I: int, H: int, threads: int, calls: int) -> dict[str, list[float]]:
    """Seconds of each call of each contender."""
    command = [sys.executable, "-m", "benchmarks.streams", "--worker"]
    workers = {
        name: subprocess.Popen(
            [*command, name, str(B), str(I), str(H), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in installed()
    }
    times: dict[str, list[float]] = {name: [] for name in workers}
    for block in range(-1, calls // BLOCK):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(f"{name} has ended with {worker.wait()}")
            if block >= 0:  # the block before compiles, packs and fills caches
                times[name] += json.loads(line)
    for worker in workers.values():
        worker.communicate()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="rows of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=20000, help="of each contender at each size")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], *map(int, args.worker[1:]))
    print(f"us a step at batch {args.batch}, {args.threads} threads: the median, and the 99th percentile in brackets")
    for I, H in SIZES:
        times = measure(args.batch, I, H, args.threads, args.calls)
        columns = [
            f"{name} {statistics.median(each) * 1e6:.1f} ({np.quantile(each, 0.99) * 1e6:.1f})"
            for name, each in times.items()
        ]
        print(f"I {I} H {H}: {', '.join(columns)}", flush=True)
    return None


if __name__ == "__main__":
    main()
