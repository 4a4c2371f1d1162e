"""The row classifier of csrc/ beside ONNX Runtime: images a second, the same model and images, on the CPU.

python -m benchmarks.cpu.classifier [--batch 1 128] [--rounds 31] [--threads 2]

`fastlstm_model_run` and `onnxruntime` are called from Python, with images that lie ready. The program is
`csrc/examples/mnist.c` as a whole: it starts, loads the model, reads the images' file and writes their classes.
Needs onnx, onnxruntime, the native library and a C compiler.
"""

import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch

from benchmarks.runtimes.with_onnx import SETTLE, onnx_model, onnx_weights, onnxruntime_session
from benchmarks.shared.clock import Run, compare, thread_counts
from benchmarks.shared.tables import Options, parser, print_table
from fastlstm.backends import csrc
from fastlstm.export import model_bytes
from fastlstm.mnist.model import RowLSTM

IMAGES = 2048
SOURCE = Path(__file__).parents[2] / "csrc" / "examples" / "mnist.c"


def onnx_classifier(model: RowLSTM, B: int, T: int) -> bytes:
    """Return `model` as an ONNX graph, input x (B, T, I), output logits (B, C)."""
    I, H, C = model.lstm.input_size, model.lstm.hidden_size, model.linear.out_features
    nodes = f"""rows = Transpose <perm=[1, 0, 2]> (x)
        y, h_n = LSTM <hidden_size={H}> (rows, w0, r0, b0)
        h = Squeeze (h_n, first)
        logits = Gemm <transB=1> (h, weight, bias)"""
    constants = onnx_weights(model.lstm) | {"first": torch.tensor([0])} | dict(model.linear.named_parameters())
    return onnx_model(f"row_lstm (float[{B},{T},{I}] x) => (float[{B},{C}] logits) {{ {nodes} }}", constants)


def onnxruntime(model: RowLSTM, images: torch.Tensor, B: int, threads: int) -> Callable[[], np.ndarray]:
    session = onnxruntime_session(onnx_classifier(model, B, images.shape[1]), threads)
    feeds = [{"x": batch.numpy()} for batch in images.split(B)]
    return lambda: np.concatenate([session.run(None, feed)[0] for feed in feeds])


def model_run(model: RowLSTM, images: torch.Tensor, B: int, threads: int) -> Callable[[], np.ndarray]:
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
) -> Iterator[tuple[str, dict[int, Run]]]:
    """Yield a call of each for each thread count. What they compute is checked."""
    with torch.no_grad():
        want = deepcopy(model).double()(images.double())

    def logits(name: str, run: Callable[[], np.ndarray]) -> Run:
        np.testing.assert_allclose(run(), want.numpy(), rtol=0, atol=1e-4, err_msg=name)  # |logits| reach 30
        return run

    def classes(run: Callable[[], bytes]) -> Run:
        if [int(line) for line in run().split()] != want.argmax(1).tolist():
            raise AssertionError("the program's classes are not the model's")
        return run

    counts = thread_counts(threads)
    yield "the program", {n: classes(program(folder, model, images, B, n)) for n in counts}
    for name, prepare in (("fastlstm_model_run", model_run), ("onnxruntime", onnxruntime)):
        yield name, {n: logits(name, prepare(model, images, B, n)) for n in counts}


def rows(options: Options) -> Iterator[list[str]]:
    torch.manual_seed(0)
    model = RowLSTM().eval()  # T 28, I 28, H 128
    images = torch.randint(256, (IMAGES, 28, 28)) / 255
    with tempfile.TemporaryDirectory() as folder:
        for B in options.batch:
            runs = dict(contenders(Path(folder), model, images, B, options.threads))
            sides = compare(runs, options.rounds, options.threads, SETTLE)
            for name, side in sides.items():
                speed = f"{IMAGES / side.seconds:.0f}"
                yield [str(B), name, str(side.threads), speed, str(side.to(sides["onnxruntime"]))]


if __name__ == "__main__":
    arguments = parser("cpu.classifier", __doc__)
    divisors = [B for B in range(1, IMAGES + 1) if IMAGES % B == 0]
    arguments.add_argument("--batch", type=int, nargs="+", choices=divisors, default=[1, 128], help="rows (1 128)")
    header = ["batch", "what", "threads", "images a second", "speed relative to ONNX Runtime"]
    print_table(header, rows(arguments.parse_args()))
