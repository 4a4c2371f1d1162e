"""ONNX Runtime and OpenVINO: models of layers, and what runs them."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.runtimes.cases import Contender, LayerCase, Unsupported, torch_module
from benchmarks.shared.shapes import Shape

# The gates of torch in the order of ONNX: i o f c of torch's i f g o, and z r h of torch's r z n
ORDERS = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
STATES = {"LSTM": ("h", "c"), "GRU": ("h",)}
OPTIONS = {"LSTM": "", "GRU": ", linear_before_reset=1"}  # by which the node is torch's layer


def onnx_weights(module: nn.RNNBase, layer: int = 0) -> dict[str, Tensor]:
    """Return w, r and b of a layer of an LSTM or a GRU, each (D, ...), with the gates in ONNX's order."""
    suffixes, order = [f"l{layer}", f"l{layer}_reverse"][: 2 if module.bidirectional else 1], ORDERS[module.mode]

    def stacked(name: str) -> Tensor:
        parts = (getattr(module, f"{name}_{suffix}").detach().chunk(len(order)) for suffix in suffixes)
        return torch.stack([torch.cat([gates[k] for k in order]) for gates in parts])

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


def onnx_layers(module: nn.RNNBase, shape: Shape) -> bytes:
    """Return an LSTM or a GRU as one node of ONNX a layer, input x (T, B, I), output y (T, B, D·H)."""
    T, B, H, D = shape.T, shape.B, shape.H, shape.directions
    options = f'<hidden_size={H}, direction="{"bidirectional" if D == 2 else "forward"}"{OPTIONS[module.mode]}>'
    lines, constants, source = [], {"merged": torch.tensor([T, B, D * H])}, "x"
    for layer in range(shape.layers):
        constants |= onnx_weights(module, layer)
        target = "y" if layer == shape.layers - 1 else f"x{layer + 1}"
        lines += [
            f"d{layer} = {module.mode} {options} ({source}, w{layer}, r{layer}, b{layer})",  # (T, D, B, H)
            f"t{layer} = Transpose <perm=[0, 2, 1, 3]> (d{layer})",
            f"{target} = Reshape (t{layer}, merged)",
        ]
        source = target
    head = f"layers (float[{T},{B},{shape.I}] x) => (float[{T},{B},{D * H}] y)"
    return onnx_model(f"{head} {{ {' '.join(lines)} }}", constants)


def onnx_step(module: nn.RNNBase, B: int) -> bytes:
    """Return one step as an ONNX model: x (1, B, I) and the states (1, B, H), h and c, to the new ones, h_n and c_n."""
    I, H, states = module.input_size, module.hidden_size, STATES[module.mode]
    of_x, *of_states = (f"float[1,{B},{size}] {name}" for size, name in ((I, "x"), *((H, state) for state in states)))
    ends = [f"{state}_n" for state in states]
    node = f"y, {', '.join(ends)} = {module.mode} <hidden_size={H}{OPTIONS[module.mode]}>"
    head = f"step ({', '.join((of_x, *of_states))}) => ({', '.join(f'float[1,{B},{H}] {end}' for end in ends)})"
    return onnx_model(f"{head} {{ {node} (x, w0, r0, b0, , {', '.join(states)}) }}", onnx_weights(module))


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


def onnxruntime_session(model: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime_layer(case: LayerCase, threads: int) -> Contender:
    return _of_session(case, _model(case), threads)


def onnxruntime_int8_layer(case: LayerCase, threads: int) -> Contender:
    if case.shape.cell != "LSTM":
        raise Unsupported
    return _of_session(case, onnx_int8(_model(case)), threads)


def _of_session(case: LayerCase, model: bytes, threads: int) -> Contender:
    session = onnxruntime_session(model, threads)
    return _contender(case, lambda feed: session.run(None, feed))


def openvino_layer(case: LayerCase, threads: int) -> Contender:
    import openvino

    core, model = openvino.Core(), _model(case)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    return _contender(case, lambda feed: list(request.infer(feed, share_inputs=True).values()))


def _model(case: LayerCase) -> bytes:
    if case.mode == "training":
        raise Unsupported
    module = torch_module(case)
    return onnx_step(module, case.shape.B) if case.mode == "step" else onnx_layers(module, case.shape)


def _contender(case: LayerCase, run: Callable[[dict[str, np.ndarray]], list[np.ndarray]]) -> Contender:
    """`run` is called with the inputs by name, and returns the output, or the states after a step."""
    names = STATES[case.shape.cell] if case.mode == "step" else ()
    feed = {"x": case.arrays["x"], **dict(zip(names, case.states))}

    def call() -> list[np.ndarray]:
        outputs = run(feed)
        feed.update(zip(names, outputs))
        return outputs

    return Contender(call, call)
