"""Other runtimes for inference, where they are installed: ONNX Runtime, OpenVINO, and nn.LSTMCell for a single step."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.clock import Contender, fastest, thread_counts
from benchmarks.shapes import Shape

SETTLE = 0.1  # seconds untimed before each sample: ONNX Runtime's idle threads spin on for 70 ms after a call


def iofc(rows: Tensor) -> Tensor:
    """(4H, ...) in blocks i f g o, as torch has them, to ONNX's order i o f c."""
    i, f, g, o = rows.detach().chunk(4)
    return torch.cat((i, o, f, g))


def onnx_model(lstm: nn.LSTM, shape: Shape) -> bytes:
    """`lstm` as one ONNX LSTM node a layer, input x (T, B, I), output y (T, B, D·H)."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, constants = [], []

    def constant(name: str, values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values, name))
        return name

    merged = constant("merged", np.array([shape.T, shape.B, shape.directions * shape.H]))
    source = "x"
    for layer in range(shape.layers):
        suffixes = [f"l{layer}", f"l{layer}_reverse"][: shape.directions]
        weights = []
        for name in ("weight_ih", "weight_hh"):
            stacked = torch.stack([iofc(getattr(lstm, f"{name}_{suffix}")) for suffix in suffixes])
            weights.append(constant(f"{name}_{layer}", stacked.numpy()))
        biases = [[iofc(getattr(lstm, f"{name}_{suffix}")) for name in ("bias_ih", "bias_hh")] for suffix in suffixes]
        bias = constant(f"bias_{layer}", torch.stack([torch.cat(pair) for pair in biases]).numpy())
        target = "y" if layer == shape.layers - 1 else f"x{layer + 1}"
        direction = "bidirectional" if shape.bidirectional else "forward"
        nodes += [
            helper.make_node("LSTM", [source, *weights, bias], [f"d{layer}"], hidden_size=shape.H, direction=direction),
            # (T, D, B, H) -> (T, B, D, H) -> (T, B, D·H)
            helper.make_node("Transpose", [f"d{layer}"], [f"t{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"t{layer}", merged], [target]),
        ]
        source = target
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "lstm",
        [value("x", TensorProto.FLOAT, [shape.T, shape.B, shape.I])],
        [value("y", TensorProto.FLOAT, [shape.T, shape.B, shape.directions * shape.H])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    checker.check_model(model)
    return model.SerializeToString()


def onnxruntime_session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
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


def lstm_cell_run(lstm: nn.LSTM, x: Tensor) -> Callable[[], Tensor]:
    cell = nn.LSTMCell(lstm.input_size, lstm.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})

    def run() -> Tensor:
        with torch.no_grad():
            return cell(x[0])[0][None]

    return run


RUNTIMES = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}


def installed() -> list[str]:
    if importlib.util.find_spec("onnx") is None:  # nothing to hand the model over with
        return []
    return [name for name in RUNTIMES if importlib.util.find_spec(name)]


def rivals(lstm: nn.LSTM, x: Tensor, shape: Shape, threads: int) -> Iterator[tuple[str, Contender]]:
    """Every rival that can run `lstm` on `x`, checked against it, each with its faster thread count."""
    with torch.no_grad():
        expected = lstm(x)[0].numpy()

    def checked(name: str, run: Callable[[], object]) -> Callable[[], object]:
        np.testing.assert_allclose(np.asarray(run()), expected, rtol=0, atol=1e-5, err_msg=f"{name} at {shape}")
        return run

    model = onnx_model(lstm, shape) if installed() else b""
    for name in installed():
        runs = {n: checked(name, RUNTIMES[name](model, x, n)) for n in thread_counts(threads)}
        yield name, fastest(runs, settle=SETTLE)
    if shape.T == 1 and shape.layers == 1 and not shape.bidirectional:
        run = checked("nn.LSTMCell", lstm_cell_run(lstm, x))
        yield "nn.LSTMCell", fastest(dict.fromkeys(thread_counts(threads), run))
