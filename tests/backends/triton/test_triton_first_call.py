"""The check that a kernel's first call makes, on the interpreter's device as on a chip that nobody has measured."""

import importlib.util
import re

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.backends import dispatch
from fastlstm.backends import triton as backend
from tests.cells.layers import normalized_gru

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is made for Linux on x86-64", allow_module_level=True)

from fastlstm.backends.triton import first_call
from fastlstm.backends.triton.gradients import Backward
from fastlstm.backends.triton.launch import Forward

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def batches(monkeypatch):
    """The kernels have to be checked, and none has been. How many batch rows each forward pass has."""
    monkeypatch.setattr(first_call, "applies", lambda device: True)
    monkeypatch.setattr(first_call, "_checked", set())
    monkeypatch.setattr(backend, "failures", {})
    found, original = [], Forward.run

    def run(self, layer):
        found.append(layer.x.shape[1])
        return original(self, layer)

    monkeypatch.setattr(Forward, "run", run)
    return found


def lstm(H=20, **options):
    return fastlstm.LSTM(3, H, **{"backend": "triton-ieee", "device": DEVICE} | options)


def x_of(B=2, T=4):
    return torch.randn(T, B, 3, device=DEVICE)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("H", [20, 140])
@pytest.mark.parametrize("masks", [(), ("lengths",), ("reset",), ("lengths", "reset")])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"backend": "triton-tf32"}])
def test_kernels_that_are_right_pass(batches, H, masks, options):
    given = {"lengths": torch.tensor([4, 2]), "reset": torch.rand(4, 2) < 0.5}
    given = {name: given[name].to(DEVICE) for name in masks}
    lstm(H, **options)(x_of(), **given)[0].sum().backward()
    assert batches == [first_call.B, 2]


def test_kernels_with_means_and_heads_pass(batches):
    """Layers of other heads are other variants, and what has no kernels has no check."""
    for H, heads in ((20, 1), (20, 2)):
        rnn = fastlstm.RNN(normalized_gru, 3, H, heads=heads, backend="triton-ieee", device=DEVICE)
        rnn(x_of())[0].sum().backward()
    assert batches == [first_call.B, 2] * 2
    with pytest.raises(RuntimeError, match="no means over 70 units"):
        fastlstm.RNN(normalized_gru, 3, 70, backend="triton-ieee", device=DEVICE)(x_of())
    assert len(batches) == 4


def test_each_variant_is_checked_once(batches):
    first, second = lstm(), lstm()
    for module, B in ((first, 2), (first, 3), (second, 2)):
        module(x_of(B))
    assert batches == [first_call.B, 2, 3, 2]
    with torch.no_grad():
        first(x_of())
    lstm(21)(x_of())
    assert batches[4:] == [first_call.B, 2] * 2


def test_what_is_not_compiled_apart_is_no_other_variant(batches):
    lstm(bidirectional=True)(x_of())
    fastlstm.LSTM(50, 20, backend="triton-ieee", device=DEVICE)(torch.randn(4, 2, 50, device=DEVICE))
    assert batches == [first_call.B, 2, 2, 2]
    for I in (3, 16, 17, 32, 33, 50):  # of 16 bits up to 32 inputs are multiplied in the kernel, padded to 16 or 32
        module = fastlstm.LSTM(I, 20, backend="triton", device=DEVICE, dtype=torch.float16)
        module(torch.randn(4, 2, I, device=DEVICE, dtype=torch.float16))
    assert batches[4:] == [first_call.B, 2, 2] * 3


@cells.cell(gates={"a": "xh"}, states=("h",))
def large(a, h):
    return cells.maximum(a * 1e5, h)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:overflow:RuntimeWarning")
def test_results_that_the_type_cannot_hold_are_left_out(batches):
    rnn = fastlstm.RNN(large, 3, 20, backend="triton", device=DEVICE, dtype=torch.float16)
    rnn(x_of().half())
    assert batches == [first_call.B, 2]
    assert backend.failures == {}


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
    assert batches[0] == first_call.B
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_a_graph_is_checked_when_it_is_traced(batches):
    module = torch.compile(lstm(), fullgraph=True, backend="aot_eager")
    module(x_of())[0].sum().backward()
    assert batches[0] == first_call.B
    assert set(batches[1:]) == {2}


def test_a_graph_of_open_sizes_is_checked(batches):
    module = torch.compile(lstm(), fullgraph=True, backend="aot_eager", dynamic=True)
    for B, T in ((2, 4), (3, 5)):
        module(x_of(B, T))
    assert batches == [first_call.B, 2, 3]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_checked(batches):
    traced = torch.jit.trace(lstm(), x_of(), check_trace=False)
    assert batches[0] == first_call.B
    assert traced(x_of(3))[0].shape == (4, 3, 20)


def changed(monkeypatch, kind, name, change):
    """Have a method of a pass give other results than it should."""
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *arguments: change(original(*arguments)))


def failing(message, match):
    with pytest.warns(RuntimeWarning, match=message) as warned, pytest.raises(RuntimeError, match=match):
        lstm()(x_of())
    return [str(warning.message) for warning in warned if warning.category is RuntimeWarning]  # old Triton has others


def test_a_wrong_result_is_reported_once(batches, monkeypatch):
    changed(monkeypatch, Forward, "run", lambda run: run._replace(h=run.h * 1.01))
    (text,) = failing("the check of its first call: the output differs", "failed its check .* the output differs")
    for part in ("report", f"torch {torch.__version__}", "triton 3.", "capability", "cell lstm", "FASTLSTM_CHECK=0"):
        assert part in text
    with pytest.raises(RuntimeError, match="failed its check"):  # without another warning, which would be an error
        lstm(30)(x_of())
    with pytest.raises(RuntimeError, match="failed its check"):
        lstm(backend="triton")(x_of())


def test_a_wrong_gradient_is_found_where_gradients_are_wanted(batches, monkeypatch):
    changed(monkeypatch, Backward, "launch", lambda found: found._replace(sums=found.sums * 1.01))
    with torch.no_grad():
        lstm()(x_of())
    failing("the gradient of x differs", "the gradient of x differs")


def test_a_result_that_is_nan_is_wrong(batches, monkeypatch):
    changed(monkeypatch, Forward, "run", lambda run: run._replace(h=run.h.log()))
    failing("differs from the reference by inf", "by inf")


def test_a_kernel_that_does_not_start_is_reported(batches, monkeypatch):
    def fails(*arguments):
        raise ValueError("no kernel image")

    monkeypatch.setattr(Forward, "run", fails)
    failing("ValueError: no kernel image", "ValueError: no kernel image")


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
    def fails(*arguments):
        raise error

    original = Forward.run
    monkeypatch.setattr(Forward, "run", fails)
    with pytest.raises(type(error), match=re.escape(str(error))):  # of the call itself
        lstm()(x_of())
    monkeypatch.setattr(Forward, "run", original)
    lstm()(x_of())
    assert batches == [first_call.B, 2]


def test_auto_takes_other_backends_after_a_failure(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    monkeypatch.setattr(backend, "failures", {(device, cells.lstm): "it failed"})
    options = {"cell": cells.lstm, "projected": False, "cells": False}
    assert dispatch.choose("auto", device, torch.float32, masked=False, **options) == "aten"
    assert dispatch.choose("auto", device, torch.float32, masked=True, **options) == "reference"
    assert dispatch.choose("auto", torch.device("cuda", 1), torch.float32, masked=False, **options) == "triton"
    for name in ("triton", "triton-tf32"):
        with pytest.raises(RuntimeError, match="it failed"):
            dispatch.choose(name, device, torch.float32, masked=False, **options)
    assert dispatch.choose("auto", device, torch.float32, masked=True, **options | {"cell": cells.gru}) == "triton"


def test_a_failure_counts_against_its_cell_alone(batches, monkeypatch):
    with monkeypatch.context() as within:
        changed(within, Forward, "run", lambda run: run._replace(h=run.h * 1.01))
        failing("the output differs", "failed its check of lstm")
    fastlstm.GRU(3, 20, backend="triton-ieee", device=DEVICE)(x_of())
    assert batches[-2:] == [first_call.B, 2]


@pytest.mark.parametrize("why", ["", "measured", "environment", "capture", "export"])
def test_when_a_device_is_checked(monkeypatch, why):
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    monkeypatch.setattr(first_call, "MEASURED", frozenset({(9, 0)} if why == "measured" else {(8, 0)}))
    monkeypatch.setenv("FASTLSTM_CHECK", "0" if why == "environment" else "1")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capture")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: why == "export")
    assert first_call.applies(torch.device("cuda", 0)) == (why == "")
    assert not first_call.applies(torch.device("cpu"))
