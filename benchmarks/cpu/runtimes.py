"""Other runtimes for inference, where they are installed: ONNX Runtime and OpenVINO."""

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.shared.clock import Run, thread_counts
from benchmarks.shared.shapes import Shape

SETTLE = 0.1  # seconds untimed before each sample: ONNX Runtime's idle threads spin on for 70 ms after a call


def onnx_weights(lstm: nn.LSTM, layer: int = 0) -> dict[str, Tensor]:
    """Return w, r and b of a layer, each (D, ...) in ONNX's order of gates, i o f c. Torch has i f g o."""
    suffixes = [f"l{layer}", f"l{layer}_reverse"][: 2 if lstm.bidirectional else 1]

    def stacked(name: str) -> Tensor:
        parts = (getattr(lstm, f"{name}_{suffix}").detach().chunk(4) for suffix in suffixes)
        return torch.stack([torch.cat((i, o, f, g)) for i, f, g, o in parts])

    biases = torch.cat((stacked("bias_ih"), stacked("bias_hh")), 1)
    return {f"w{layer}": stacked("weight_ih"), f"r{layer}": stacked("weight_hh"), f"b{layer}": biases}


def onnx_model(graph: str, constants: dict[str, Tensor]) -> bytes:
    """Return the model of a graph in ONNX's own language, in which the constants have names."""
    from onnx import checker, helper, numpy_helper, parser

    parsed = parser.parse_graph(graph)
    parsed.initializer.extend(numpy_helper.from_array(a.detach().numpy(), name) for name, a in constants.items())
    model = helper.make_model(parsed, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    checker.check_model(model)
    return bytes(model.SerializeToString())


def onnx_layers(lstm: nn.LSTM, shape: Shape) -> bytes:
    """Return `lstm` as one ONNX LSTM node a layer, input x (T, B, I), output y (T, B, D·H)."""
    T, B, H, D = shape.T, shape.B, shape.H, shape.directions
    options = f'<hidden_size={H}, direction="{"bidirectional" if D == 2 else "forward"}">'
    lines, constants, source = [], {"merged": torch.tensor([T, B, D * H])}, "x"
    for layer in range(shape.layers):
        constants |= onnx_weights(lstm, layer)
        target = "y" if layer == shape.layers - 1 else f"x{layer + 1}"
        lines += [
            f"d{layer} = LSTM {options} ({source}, w{layer}, r{layer}, b{layer})",  # (T, D, B, H)
            f"t{layer} = Transpose <perm=[0, 2, 1, 3]> (d{layer})",
            f"{target} = Reshape (t{layer}, merged)",
        ]
        source = target
    head = f"layers (float[{T},{B},{shape.I}] x) => (float[{T},{B},{D * H}] y)"
    return onnx_model(f"{head} {{ {' '.join(lines)} }}", constants)


def onnx_int8(model: bytes) -> bytes:
    """Return the model with DynamicQuantizeLSTM, which has a scale for each weight row."""
    from onnx import load_from_string
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        options = {"op_types_to_quantize": ["LSTM"], "per_channel": True, "weight_type": QuantType.QInt8}
        quantize_dynamic(load_from_string(model), path, **options)
        quantized = path.read_bytes()
    if b"DynamicQuantizeLSTM" not in quantized:
        raise RuntimeError("ONNX Runtime has left the LSTM as it was")
    return quantized


def onnxruntime_session(model: bytes, threads: int, spinning: bool = True) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime_run(model: bytes, x: Tensor, threads: int) -> Callable[[], np.ndarray]:
    session, feed = onnxruntime_session(model, threads), {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_run(model: bytes, x: Tensor, threads: int) -> Callable[[], np.ndarray]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    feed = {0: x.numpy()}
    return lambda: request.infer(feed, share_inputs=True)[0]


RUNTIMES = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}


def installed() -> list[str]:
    if importlib.util.find_spec("onnx") is None:  # nothing to hand the model over with
        return []
    return [name for name in RUNTIMES if importlib.util.find_spec(name)]


def rivals(lstm: nn.LSTM, x: Tensor, shape: Shape, threads: int) -> Iterator[tuple[str, dict[int, Run]]]:
    """Yield every rival that can run `lstm` on `x`, checked against it, with a call for each thread count."""
    with torch.no_grad():
        expected = lstm(x)[0].numpy()

    model = onnx_layers(lstm, shape) if installed() else b""
    for name in installed():
        runs = {n: RUNTIMES[name](model, x, n) for n in thread_counts(threads)}
        for run in runs.values():
            np.testing.assert_allclose(run(), expected, rtol=0, atol=1e-5, err_msg=f"{name} at {shape}")
        yield name, runs
