"""The comparison with other runtimes: what is compared is one layer."""

from dataclasses import replace

import pytest

from benchmarks.runtimes import with_torch, worker
from benchmarks.runtimes.cases import TOLERANCE, Unsupported, make
from benchmarks.shared.shapes import Shape

LAYERS = {
    "inference": [Shape(5, 3, 4, 7), Shape(4, 2, 3, 5, layers=2, bidirectional=True)],
    "step": [Shape(1, 1, 3, 5)],
    "training": [Shape(5, 3, 4, 7)],
}
KINDS = [(mode, replace(shape, cell=cell)) for mode in LAYERS for shape in LAYERS[mode] for cell in ("LSTM", "GRU")]


def check(contender, case, tolerance=TOLERANCE):
    """The results are torch's. After a step the state has gone on, so that the next step has others."""
    case.compare("it", contender.results(), tolerance)
    assert (case.error(contender.results()) > TOLERANCE) == (case.mode == "step")


@pytest.mark.parametrize("name", [name for name in worker.installed() if "int8" not in name])
@pytest.mark.parametrize(("mode", "shape"), KINDS, ids=lambda value: str(value))
def test_a_runtime_computes_torchs_layer(name, mode, shape):
    case = make(mode, shape)
    try:
        contender = worker.builder(name)(case, 1)
    except Unsupported:
        return
    check(contender, case)


@pytest.mark.parametrize(("mode", "shape"), KINDS, ids=lambda value: str(value))
def test_the_modules_of_torch_compute_torchs_layer(mode, shape):
    case = make(mode, shape)
    contenders = with_torch.modules(case)
    assert {"fastlstm", "torch"} <= set(contenders)
    for contender in contenders.values():
        check(contender, case)


def test_a_wrong_result_is_told():
    case = make("inference", LAYERS["inference"][0])
    results = [a + 2 * TOLERANCE for a in with_torch.modules(case)["fastlstm"].results()]
    with pytest.raises(AssertionError, match="other: inference of T5-B3-I4-H7 errs by 2"):
        case.compare("other", results)


@pytest.mark.skipif("ONNX Runtime" not in worker.installed(), reason="ONNX Runtime is not installed")
def test_a_runtime_is_timed_in_a_process_of_its_own():
    case = make("step", LAYERS["step"][0])
    calls = worker.elsewhere(case, ["ONNX Runtime", "no such runtime"], [1, 2])
    assert {name: list(of) for name, of in calls.items()} == {"ONNX Runtime": [1, 2]}
    assert all(0 < call.sample() < 1 for call in calls["ONNX Runtime"].values())
    assert worker.elsewhere(make("training", LAYERS["training"][0]), ["ONNX Runtime"], [1]) == {}


@pytest.mark.skipif("ONNX Runtime" not in worker.installed(), reason="ONNX Runtime is not installed")
def test_the_process_of_a_runtime_goes_on_after_a_wrong_result():
    right, other = (make("inference", shape) for shape in LAYERS["inference"])
    wrong = replace(right, arrays=right.arrays | {"output": right.arrays["output"] + 1})
    with pytest.raises(AssertionError, match="ONNX Runtime: inference of T5-B3-I4-H7 errs by 1"):
        worker.elsewhere(wrong, ["ONNX Runtime"], [1])
    assert worker.elsewhere(other, ["ONNX Runtime"], [1])["ONNX Runtime"][1].sample() > 0
