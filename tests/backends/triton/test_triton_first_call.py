"""The comparison that a variant's first call makes, on the interpreter's device as on a chip nobody has measured."""

import re
import warnings

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.backends import dispatch

pytest.importorskip("triton", reason="triton is made for Linux on x86-64")

from fastlstm.backends.triton import device as gpu
from fastlstm.backends.triton import first_call
from fastlstm.backends.triton.backward_pass import Backward
from fastlstm.backends.triton.launch import Forward

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
EXAMPLE = 9  # rows of the comparison of a resident kernel


@pytest.fixture
def batches(monkeypatch):
    """The kernels have to be compared, and none has been. How many batch rows each forward pass on the device has."""
    monkeypatch.setattr(gpu, "is_gpu", lambda device: device.type != "meta")
    monkeypatch.setattr(first_call, "compares", lambda device: True)
    for name, empty in (("_passed", set()), ("failures", {}), ("_reports", {})):
        monkeypatch.setattr(first_call, name, empty)
    monkeypatch.setattr(dispatch, "_warned", set())
    found, original = [], Forward.run

    def run(self, layer):
        found.extend([layer.x.shape[1]] * (not layer.x.is_meta))
        return original(self, layer)

    monkeypatch.setattr(Forward, "run", run)
    return found


def lstm(H=20, **options):
    return fastlstm.LSTM(3, H, **{"backend": "triton-ieee", "device": DEVICE} | options)


def x_of(B=2, T=4):
    return torch.randn(T, B, 3, device=DEVICE)


@pytest.mark.sampled(11)
@pytest.mark.parametrize(("H", "example"), [(20, EXAMPLE), (140, 33)])
@pytest.mark.parametrize("masks", [(), ("lengths",), ("reset",), ("lengths", "reset")])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"backend": "triton-tf32"}])
def test_kernels_that_are_right_pass(batches, H, example, masks, options):
    given = {"lengths": torch.tensor([4, 2]), "reset": torch.rand(4, 2) < 0.5}
    given = {name: given[name].to(DEVICE) for name in masks}
    lstm(H, **options)(x_of(), **given)[0].sum().backward()
    assert batches == [example, 2]


def test_kernels_with_means_products_and_heads_pass(batches):
    """Layers of other heads are other variants, and what has no kernels has no check."""
    for cell, heads in ((cells.dreamer_gru, 1), (cells.dreamer_gru, 2), (cells.gru_reset_before, 2)):
        rnn = fastlstm.RNN(cell, 3, 20, heads=heads, backend="triton-ieee", device=DEVICE)
        rnn(x_of())[0].sum().backward()
    assert batches == [EXAMPLE, 2] * 3
    with pytest.raises(RuntimeError, match="no means over 70 units"):
        fastlstm.RNN(cells.dreamer_gru, 3, 70, backend="triton-ieee", device=DEVICE)(x_of())
    assert len(batches) == 6


def test_kernels_of_a_capture_are_compared_later(batches, monkeypatch):
    with monkeypatch.context() as capture:
        capture.setattr(first_call, "compares", lambda device: False)
        lstm()(x_of())
    assert batches == [2]
    lstm()(x_of())
    assert batches == [2, EXAMPLE, 2]


def test_each_variant_is_compared_once(batches):
    first, second = lstm(), lstm()
    for module, B in ((first, 2), (first, 3), (second, 2)):
        module(x_of(B))
    assert batches == [EXAMPLE, 2, 3, 2]
    with torch.no_grad():
        first(x_of())
    lstm(21)(x_of())
    assert batches[4:] == [EXAMPLE, 2] * 2


def test_what_is_not_compiled_apart_is_no_other_variant(batches):
    lstm(bidirectional=True)(x_of())
    fastlstm.LSTM(50, 20, backend="triton-ieee", device=DEVICE)(torch.randn(4, 2, 50, device=DEVICE))
    assert batches == [EXAMPLE, 2, 2, 2]
    for I in (3, 16, 17, 32, 33, 50):  # of 16 bits up to 32 inputs are multiplied in the kernel, padded to 16 or 32
        module = fastlstm.LSTM(I, 20, backend="triton", device=DEVICE, dtype=torch.float16)
        module(torch.randn(4, 2, I, device=DEVICE, dtype=torch.float16))
    assert batches[4:] == [EXAMPLE, 2, 2] * 3


@cells.cell(gates={"a": "xh"}, states=("h",))
def large(a, h):
    return cells.maximum(a * 1e5, h)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:overflow:RuntimeWarning")
def test_results_that_the_type_cannot_hold_are_left_out(batches):
    rnn = fastlstm.RNN(large, 3, 20, backend="triton", device=DEVICE, dtype=torch.float16)
    rnn(x_of().half())
    assert batches == [EXAMPLE, 2]
    assert first_call.failures == {}


def test_a_check_leaves_random_numbers_and_modes_alone(batches):
    module, x = lstm(), x_of()
    torch.manual_seed(1)
    with torch.inference_mode():
        module(x)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    weights = dict(module.named_parameters())
    gradients = torch.func.grad(lambda weights: torch.func.functional_call(module, weights, (x,))[0].sum())(weights)
    assert batches[0] == EXAMPLE
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_is_checked_when_it_is_traced(batches, dynamic):
    module = torch.compile(lstm(), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    module(x_of())[0].sum().backward()
    assert batches[0] == EXAMPLE
    if dynamic:
        module(x_of(3, 5))
    assert set(batches[1:]) == ({2, 3} if dynamic else {2})


def changed(monkeypatch, kind, name, change):
    """Have a method of a pass give other results than it should."""
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *arguments: change(original(*arguments)))


def raises(error):
    def fails(*_):
        raise error

    return fails


@pytest.mark.parametrize(
    ("kind", "name", "change", "reason"),
    [
        (Forward, "run", lambda run: run._replace(h=run.h * 1.01), "the output differs from the reference by 1.0e-02"),
        (Forward, "run", lambda run: run._replace(h=run.h.log()), "differs from the reference by inf"),
        (Backward, "launch", lambda out: out._replace(preact=out.preact * 1.01), "the gradient of x differs"),
        (Forward, "_run", raises(ValueError("no kernel image")), "ValueError: no kernel image"),
    ],
    ids=["result", "nan", "gradient", "start"],
)
def test_a_failure_takes_out_its_size_and_type(batches, monkeypatch, kind, name, change, reason):
    """By name it raises, and `auto` takes torch's own layer with one warning, or plain PyTorch for what that lacks."""
    with monkeypatch.context() as within:
        changed(within, kind, name, change)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=f"the triton backend failed its first call on .*: .*{reason}"
            ) as found:
                lstm()(x_of())
        for part in ("report", f"torch {torch.__version__}", "triton 3.", "capability", "cell lstm", "H 20"):
            assert part in str(found.value)
        if kind is Backward:
            with torch.no_grad():
                lstm(21)(x_of())  # which wants no gradient
    with monkeypatch.context() as within:  # as `auto` takes it where torch's setting is "ieee"
        precisions = {torch.float32: "ieee", torch.float16: "native"}
        within.setattr("fastlstm.backends.triton.resolve_precision", lambda dtype, _: precisions[dtype])
        module, x, reset = lstm(backend="auto"), x_of(), torch.rand(4, 2, device=DEVICE) < 0.5
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for options in ({}, {"lengths": torch.tensor([4, 2], device=DEVICE)}, {"reset": reset}):
                got, _ = module(x, **options)
                with fastlstm.use_backend("reference"):
                    torch.testing.assert_close(got, lstm_like(module)(x, **options)[0], atol=1e-6, rtol=0)
        assert [reason.split(":")[0] in str(warning.message) for warning in caught] == [True]
        ran = len(batches)
        for other in (lstm(22, backend="auto"), fastlstm.GRU(3, 20, device=DEVICE)):
            other(x)
        assert batches[ran:] == [EXAMPLE, 2] * 2
        lstm(backend="auto", dtype=torch.float16)(x.half())
        assert batches[-2:] == [EXAMPLE, 2]


def lstm_like(module):
    other = lstm(backend=None)
    other.load_state_dict(module.state_dict())
    return other


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("called a synchronizing CUDA operation"),
    ],
    ids=lambda error: str(error).split()[0],
)
def test_what_passes_is_no_failure(batches, monkeypatch, error):
    with monkeypatch.context() as within:
        within.setattr(Forward, "run", raises(error))
        with pytest.raises(type(error), match=re.escape(str(error))):  # of the call itself
            lstm()(x_of())
    lstm()(x_of())
    assert batches == [EXAMPLE, 2]


@pytest.mark.parametrize("why", ["", "measured", "environment", "capture", "export"])
def test_when_a_device_is_compared(monkeypatch, why):
    monkeypatch.setattr(gpu, "capability", lambda device: (9, 0))
    monkeypatch.setattr(first_call, "MEASURED", frozenset({(9, 0)} if why == "measured" else {(8, 0)}))
    monkeypatch.setenv("FASTLSTM_CHECK", "0" if why == "environment" else "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capture")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: why == "export")
    assert first_call.compares(torch.device("cuda", 0)) == (why == "")
    assert not first_call.compares(torch.device("cpu"))
