"""The row classifier of csrc/ beside ONNX Runtime: images a second, the same model and images, on the CPU.

python -m benchmarks.classifier [--batch 1 128] [--rounds 31] [--threads 2]

`fastlstm_model_run` and `onnxruntime` are called from Python, with images that lie ready. The program is
`csrc/examples/mnist.c` as a whole: it starts, loads the model, reads the images' file and writes their classes.
Needs onnx, onnxruntime, the native library and a C compiler.
"""

import argparse
import ctypes
import os
import statistics
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from benchmarks.clock import Contender, fastest, interleaved, ratio_of, thread_counts
from benchmarks.rivals import SETTLE, iofc, onnxruntime_session
from fastlstm.backends import csrc
from fastlstm.export import model_bytes
from fastlstm.mnist.model import RowLSTM

IMAGES = 2048
SOURCE = Path(__file__).parents[1] / "csrc" / "examples" / "mnist.c"
Run = Callable[[], np.ndarray]


def onnx_classifier(model: RowLSTM, B: int, T: int) -> bytes:
    """`model` as an ONNX graph, input x (B, T, I), output logits (B, C)."""
    from onnx import TensorProto, checker, helper, numpy_helper

    lstm, value = model.lstm, helper.make_tensor_value_info
    constants = {
        "weight_ih": iofc(lstm.weight_ih_l0)[None],
        "weight_hh": iofc(lstm.weight_hh_l0)[None],
        "biases": torch.cat((iofc(lstm.bias_ih_l0), iofc(lstm.bias_hh_l0)))[None],
        "first": torch.tensor([0]),
        "weight": model.linear.weight.detach(),
        "bias": model.linear.bias.detach(),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["rows"], perm=[1, 0, 2]),
        helper.make_node(
            "LSTM", ["rows", "weight_ih", "weight_hh", "biases"], ["", "h_n"], hidden_size=lstm.hidden_size
        ),
        helper.make_node("Squeeze", ["h_n", "first"], ["h"]),
        helper.make_node("Gemm", ["h", "weight", "bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "row_lstm",
        [value("x", TensorProto.FLOAT, [B, T, lstm.input_size])],
        [value("logits", TensorProto.FLOAT, [B, model.linear.out_features])],
        [numpy_helper.from_array(array.numpy(), name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    checker.check_model(made)
    return made.SerializeToString()


def onnxruntime(model: RowLSTM, images: torch.Tensor, B: int, threads: int) -> Run:
    session = onnxruntime_session(onnx_classifier(model, B, images.shape[1]), threads)
    feeds = [{"x": batch.numpy()} for batch in images.split(B)]
    return lambda: np.concatenate([session.run(None, feed)[0] for feed in feeds])


def model_run(model: RowLSTM, images: torch.Tensor, B: int, threads: int) -> Run:
    """fastlstm_model_run of csrc/fastlstm.h, on the library's own threads."""
    library, content, loaded = ctypes.CDLL(str(csrc.LIBRARY)), model_bytes(model.state_dict()), ctypes.c_void_p()
    library.fastlstm_model_read(content, ctypes.c_size_t(len(content)), ctypes.byref(loaded))
    call = library.fastlstm_model_run
    call.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 2, ctypes.c_char_p]
    team, (count, T, I), C = csrc.THREADS.pack(threads, 0, 0), images.shape, model.linear.out_features
    logits = np.full((count, C), np.nan, np.float32)

    def run() -> np.ndarray:
        for k in range(0, count, B):
            call(loaded, B, T, images.data_ptr() + 4 * k * T * I, logits.ctypes.data + 4 * k * C, team)
        return logits

    return run


def program(folder: Path, model: RowLSTM, images: torch.Tensor, B: int, threads: int) -> Callable[[], bytes]:
    """The example, linked with the library of this installation."""
    executable, weights, pixels = folder / "mnist", folder / "row_lstm.flstm", folder / "images"
    if not executable.exists():
        weights.write_bytes(model_bytes(model.state_dict()))
        pixels.write_bytes(struct.pack(">4I", 0x803, *images.shape) + (images * 255).round().byte().numpy().tobytes())
        link = [csrc.LIBRARY, f"-Wl,-rpath,{csrc.LIBRARY.parent}"]
        subprocess.run([os.environ.get("CC", "cc"), "-O2", SOURCE, *link, "-o", executable], check=True)
    command = [executable, weights, pixels, str(B), str(threads)]
    return lambda: subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def contenders(
    folder: Path, model: RowLSTM, images: torch.Tensor, B: int, threads: int
) -> Iterator[tuple[str, Contender]]:
    """Each with its faster thread count; what they compute is checked.

    One after the other: what is not chosen is gone before the next is made, ONNX Runtime's spinning threads with it.
    """
    with torch.no_grad():
        want = deepcopy(model).double()(images.double())

    def logits(name: str, run: Run) -> Run:
        np.testing.assert_allclose(run(), want.numpy(), rtol=0, atol=1e-4, err_msg=name)  # |logits| reach 30
        return run

    def classes(run: Callable[[], bytes]) -> Callable[[], bytes]:
        if [int(line) for line in run().split()] != want.argmax(1).tolist():
            raise AssertionError("the program's classes are not the model's")
        return run

    counts = thread_counts(threads)
    yield "the program", best({n: classes(program(folder, model, images, B, n)) for n in counts})
    for name, prepare in (("fastlstm_model_run", model_run), ("onnxruntime", onnxruntime)):
        yield name, best({n: logits(name, prepare(model, images, B, n)) for n in counts})


def best(runs: Mapping[int, Callable[[], object]]) -> Contender:
    return fastest(runs, rounds=3, settle=SETTLE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classifier", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 128], help=f"sizes that divide {IMAGES} (1 128)")
    parser.add_argument("--rounds", type=int, default=31, help="interleaved rounds (31)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="at most; as torch chooses")
    options = parser.parse_args()
    if wrong := [B for B in options.batch if B < 1 or IMAGES % B]:
        parser.error(f"argument --batch: must divide {IMAGES}, got {wrong[0]}")
    torch.manual_seed(0)
    model = RowLSTM().eval()  # T 28, I 28, H 128
    images = torch.randint(256, (IMAGES, 28, 28)) / 255
    about = machine.describe(options.threads)
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items() if number)
    print(f"{about['cpu']}, {about['cores']} cores; {versions}; load average {about['load']}")
    with tempfile.TemporaryDirectory() as folder:
        for B in options.batch:
            runs = dict(contenders(Path(folder), model, images, B, options.threads))
            times = interleaved(runs, options.rounds, SETTLE)
            for name, seconds in times.items():
                ratio = ratio_of(times["onnxruntime"], seconds)
                print(
                    f"batch {B:4}  {name:20} {runs[name].threads} threads {IMAGES / statistics.median(seconds):9.0f} "
                    f"images/s, {ratio.median:.2f} times ONNX Runtime's ({ratio.low:.2f} to {ratio.high:.2f})"
                )


if __name__ == "__main__":
    main()
