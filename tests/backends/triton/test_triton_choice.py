"""Which of torch's tensors and settings the Triton backend takes, and what it says of the others."""

import importlib.util
import os
import threading

import pytest
import torch

from fastlstm import cells
from fastlstm.backends import dispatch
from fastlstm.backends import triton as backend
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import Layer

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is made for Linux on x86-64", allow_module_level=True)


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


SETTINGS = """
import torch
from fastlstm.backends.triton import resolve_precision
from torch.backends import cudnn

def now(): print(resolve_precision(torch.float32, None))

now()
for cudnn.allow_tf32 in (False, True): now()
for cudnn.rnn.fp32_precision in ("ieee", "tf32"): now()
cudnn.rnn.fp32_precision = "none"  # what is set for all of cuDNN
for cudnn.fp32_precision in ("ieee", "tf32"): now()
"""


def test_every_setting_of_torch_is_followed():
    """In a process of its own: the older name may not be mixed with the newer ones. Torch's default is tf32."""
    done = interpreter.run(SETTINGS, cwd=ROOT)
    assert done.stdout.split() == ["tf32", *3 * ["ieee", "tf32"]], done.stderr


def test_precision_follows_torch_unless_it_is_named():
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        found = []
        for setting in ("ieee", "tf32"):
            rnn.fp32_precision = setting
            found.append(backend.resolve_precision(torch.float32, None))
    finally:
        rnn.fp32_precision = before
    assert found == ["ieee", "tf32"]
    assert backend.resolve_precision(torch.float32, "ieee") == "ieee"
    assert backend.resolve_precision(torch.bfloat16, "ieee") == "native"
    layer = Layer(3, 2, 4, 50)
    inputs = [a.to(DEVICE) for a in layer.to(torch.float32, requires_grad=False)]
    exact, rounded = layer.run(inputs, "triton-ieee")[0], layer.run(inputs, "triton-tf32")[0]
    assert 1e-6 < (exact - rounded).abs().max() < 1e-2


PRODUCTS = """
import torch
from fastlstm import cells
from fastlstm.backends.base import Gradients, Layer, Run
from fastlstm.backends import triton as backend

def now(): return torch._C._get_fp32_precision_getter("cuda", "matmul")

def recorded(function):
    def run(*arguments):
        found.append(now())
        return function(*arguments)
    return run

torch.nn.functional.linear = recorded(torch.nn.functional.linear)
torch.Tensor.__matmul__, torch.addmm = recorded(torch.Tensor.__matmul__), recorded(torch.addmm)
weights, state = (torch.randn(16, 3), torch.randn(16, 4), torch.randn(16), None), torch.randn(2, 4)
layer = Layer(torch.randn(5, 2, 3), weights, (state, state), None, None, False, cells.lstm)
grads, needs = Run(torch.randn(5, 2, 4), (None, None), ()), Gradients.of(cells.lstm, [True] * 7)
for outside in ("none", "ieee", "tf32", "inherited tf32"):
    generic, _, own = outside.rpartition(" ")
    torch.backends.fp32_precision = own if generic else "none"
    torch._C._set_fp32_precision_setter("cuda", "matmul", "none" if generic else own)
    for wanted in ("ieee", "tf32"):
        found = []
        backend.backward(grads, layer, backend.forward(layer, True, wanted), needs, wanted)
        print(wanted, *sorted({"tf32" if a == "tf32" else "ieee" for a in found}), len(found), now() == own)
    if generic:
        torch.backends.fp32_precision = "ieee"
        print(now())
"""


def test_torchs_products_have_the_precision_of_the_recurrent_ones():
    """In a process of its own, whose setting is found again."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = interpreter.run(PRODUCTS, cwd=ROOT, environment=environment)
    each = ["ieee ieee 5 True", "tf32 tf32 5 True"]  # forward x; backward x, weight_ih, weight_hh in two parts
    assert done.stdout.splitlines() == [*4 * each, "ieee"], done.stderr


def test_layers_of_two_precisions_wait_for_each_other(monkeypatch):
    """The first to leave would else restore what the second needs, and the second the first one's, for good."""
    now = ["none"]
    monkeypatch.setattr(torch._C, "_get_fp32_precision_getter", lambda *_: now[0])
    monkeypatch.setattr(torch._C, "_set_fp32_precision_setter", lambda *names: now.__setitem__(0, names[-1]))
    entered, seen = threading.Event(), []

    def second():
        entered.wait()
        with backend._products("ieee"):
            seen.append(now[0])

    thread = threading.Thread(target=second)
    thread.start()
    with backend._products("tf32"):
        entered.set()
        thread.join(0.2)
        seen.append(now[0])
    thread.join()
    assert seen == ["tf32", "none"]
    assert now == ["none"]


def choose(name, device, dtype=torch.float32, **options):
    options = {"projected": False, "masked": False, "cells": False} | options
    return dispatch.choose(name, torch.device(device), dtype, cell=cells.lstm, **options)


def test_the_ladder():
    assert choose("auto", "cpu") == "numba"
    assert choose("auto", "cuda", torch.float64) == "aten"
    assert choose("auto", "cuda", torch.float64, masked=True) == "reference"
    with pytest.raises(RuntimeError, match="got torch"):
        choose("triton", "cuda", torch.float64)
    with pytest.raises(RuntimeError, match="no projections"):
        choose("triton", "meta", projected=True)


def test_the_ladder_with_a_gpu(monkeypatch):
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    assert choose("auto", "cuda") == "triton"
    monkeypatch.setattr(backend, "capability", lambda device: (7, 5))
    assert choose("auto", "cuda") == "aten"
    with pytest.raises(RuntimeError, match=r"the triton backend needs compute capability 8.0, got 7.5"):
        choose("triton", "cuda")
    monkeypatch.setattr(backend, "_INSTALLED", False)
    with pytest.raises(RuntimeError, match="the triton backend needs the package triton, which is not installed"):
        choose("triton-ieee", "cuda")


def test_without_the_interpreter_cpu_tensors_are_refused():
    code = (
        "import torch, fastlstm\n"
        "try:\n"
        "    fastlstm.LSTM(2, 3, backend='triton')(torch.zeros(1, 1, 2))\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = interpreter.run(code, cwd=ROOT, environment=environment)
    assert done.stdout.startswith("the triton backend needs CUDA tensors"), done.stderr
