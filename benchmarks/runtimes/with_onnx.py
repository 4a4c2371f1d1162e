"""ONNX Runtime and OpenVINO: models that torch exports, and what runs them."""

import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.runtimes.cases import Contender, LayerCase, Unsupported, torch_module


class OneResult(nn.Module):
    """A layer that returns its output alone. Called with states after x, it returns the new states alone, of which the
    first is the output of a step.
    """

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        output, new = self.layer(x, states if len(states) > 1 else states[0] if states else None)
        return new if states else output


def onnx_model(module: nn.Module, **inputs: Tensor) -> bytes:
    """Return a module as ONNX for inputs of these sizes. torch's newer exporter takes a minute for a layer."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other batch sizes than the inputs'
        torch.onnx.export(module.eval(), tuple(inputs.values()), file, input_names=list(inputs), dynamo=False)
    return file.getvalue()


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


def onnxruntime_layer(case: LayerCase, threads: int, change: Callable[[bytes], bytes] = bytes) -> Contender:
    session = onnxruntime_session(change(_model(case)), threads)
    return _contender(case, lambda feed: session.run(None, feed))


def onnxruntime_int8_layer(case: LayerCase, threads: int) -> Contender:
    if case.shape.cell != "LSTM":
        raise Unsupported
    return onnxruntime_layer(case, threads, onnx_int8)


def openvino_layer(case: LayerCase, threads: int) -> Contender:
    import openvino

    core, model = openvino.Core(), _model(case)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    return _contender(case, lambda feed: list(request.infer(feed, share_inputs=True).values()))


def _model(case: LayerCase) -> bytes:
    """Return the model of a layer, x to y, or of a step, x and the states to the new ones."""
    if case.mode == "training":
        raise Unsupported
    inputs = {"x": case.arrays["x"], **dict(zip(case.state_names, case.states))}
    return onnx_model(OneResult(torch_module(case)), **{name: torch.from_numpy(a) for name, a in inputs.items()})


def _contender(case: LayerCase, run: Callable[[dict[str, np.ndarray]], list[np.ndarray]]) -> Contender:
    """`run` is called with the inputs by name, and returns the output, or the states after a step."""
    names = case.state_names
    feed = {"x": case.arrays["x"], **dict(zip(names, case.states))}

    def call() -> list[np.ndarray]:
        outputs = run(feed)
        feed.update(zip(names, outputs))
        return outputs

    return Contender(call, call)
