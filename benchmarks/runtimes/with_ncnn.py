"""ncnn, which runs one sequence, without a batch and without training."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runtimes.cases import Contender, LayerCase, Unsupported

# The gates of torch in the order of ncnn: i f o g of torch's i f g o, and torch's own for a GRU
ORDERS = {"LSTM": (0, 1, 3, 2), "GRU": (0, 1, 2)}
HEADER, RAW = "7767517", bytes(4)  # what begins a file of parameters, and an array of float32 in the file of weights


def _weights(case: LayerCase, layer: int) -> bytes:
    """Return what ncnn reads of one layer: weight_ih, the biases and weight_hh, each of all directions."""
    order = ORDERS[case.shape.cell]
    of_directions = [case.weights(layer, d, order) for d in range(case.shape.directions)]
    biases = [_biases(case, bias_ih, bias_hh) for *_, bias_ih, bias_hh in of_directions]
    arrays = [each[0] for each in of_directions], biases, [each[1] for each in of_directions]
    return b"".join(RAW + b"".join(np.ascontiguousarray(a).tobytes() for a in each) for each in arrays)


def _biases(case: LayerCase, bias_ih: np.ndarray, bias_hh: np.ndarray) -> np.ndarray:
    """Return one bias a gate. A GRU has both for its last gate, which comes last."""
    if case.shape.cell == "LSTM":
        return bias_ih + bias_hh
    last = case.shape.H
    return np.concatenate([(bias_ih + bias_hh)[:-last], bias_ih[-last:], bias_hh[-last:]])


def ncnn_layer(case: LayerCase, threads: int) -> Contender:
    if case.mode == "training" or case.shape.B > 1:
        raise Unsupported
    import ncnn

    s, names = case.shape, ["h", "c"][: len(case.states)]
    lines = [f"Input {name} 0 1 {name}" for name in ("x", *names)]
    source, content = "x", b""
    for layer in range(s.layers):
        target, content = f"y{layer}", content + _weights(case, layer)
        ends = [f"{name}_n" for name in names]
        count = case.gates * s.H * s.directions * (s.I if layer == 0 else s.directions * s.H)
        blobs = " ".join([source, *names, target, *ends])
        sizes = f"0={s.H} 1={count} 2={2 if s.bidirectional else 0}"  # 2: forward, or both directions
        lines.append(f"{s.cell} layer{layer} {1 + len(names)} {1 + len(ends)} {blobs} {sizes}")
        source = target
    blob_count = 1 + s.layers + 2 * len(names)
    net = ncnn.Net()
    net.opt.num_threads = threads
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layers"
        path.with_suffix(".param").write_text("\n".join([HEADER, f"{len(lines)} {blob_count}", *lines]) + "\n")
        path.with_suffix(".bin").write_bytes(content)
        if net.load_param(f"{path}.param") or net.load_model(f"{path}.bin"):
            raise RuntimeError("ncnn cannot read the model")
    x = ncnn.Mat(np.ascontiguousarray(case.arrays["x"][:, 0]))
    states = [ncnn.Mat(np.ascontiguousarray(a[:, 0])) for a in case.states]

    def call() -> Any:
        extractor = net.create_extractor()
        for name, a in zip(("x", *names), (x, *states)):
            extractor.input(name, a)
        _, output = extractor.extract(source)
        states[:] = [extractor.extract(f"{name}_n")[1] for name in names]
        return output

    return Contender(call, lambda: [np.array(call()).reshape(case.arrays["output"].shape)])
