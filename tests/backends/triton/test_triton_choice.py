"""Which of torch's tensors and settings the Triton backend takes, and what it says of the others."""

import os
import re
import threading
import warnings

import pytest
import torch

import fastlstm
from fastlstm import cells
from fastlstm.backends import dispatch
from fastlstm.backends.base import Layer
from fastlstm.backends.triton import device as gpu
from fastlstm.backends.triton import tiles
from tests.helpers import ROOT, interpreter
from tests.helpers import layers as helpers
from tests.helpers.layers import Case

pytest.importorskip("triton", reason="triton is made for Linux on x86-64")

from fastlstm.backends.triton import launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


SETTINGS = """
import torch
from fastlstm.backends.triton.device import resolve_precision
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


def test_a_precision_that_is_named_is_taken():
    assert gpu.resolve_precision(torch.float32, "ieee") == "ieee"
    assert gpu.resolve_precision(torch.bfloat16, "ieee") == "native"
    layer = helpers.Layer(3, 2, 4, 50)
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
        names.add(older(allows))
        return function(*arguments)
    return run

torch.nn.functional.linear = recorded(torch.nn.functional.linear)
torch.Tensor.__matmul__, torch.addmm = recorded(torch.Tensor.__matmul__), recorded(torch.addmm)
weights, state = (torch.randn(16, 3), torch.randn(16, 4), torch.randn(16), None), torch.randn(2, 4)
layer = Layer(torch.randn(5, 2, 3), weights, (state, state), None, None, False, cells.lstm)
grads, needs = Run(torch.randn(5, 2, 4), (None, None), ()), Gradients.of(cells.lstm, [True] * 7)
def older(read):
    try:
        return read()
    except RuntimeError:
        return "mixed"

def allows():
    return torch.backends.cuda.matmul.allow_tf32

def settings():
    return now(), older(allows), older(torch.get_float32_matmul_precision)

for outside in ("older highest", "older medium", "none", "ieee", "tf32", "inherited tf32"):
    generic, _, own = outside.rpartition(" ")
    if generic == "older":
        torch.set_float32_matmul_precision(own)
    else:
        torch.backends.fp32_precision = own if generic else "none"
        torch._C._set_fp32_precision_setter("cuda", "matmul", "none" if generic else own)
    before = settings()
    for wanted in ("ieee", "tf32"):
        found, names = [], set()
        backend.backward(grads, layer, backend.forward(layer, True, wanted), needs, wanted)
        same = settings() == before and ("mixed" in before or "mixed" not in names)
        print(wanted, *sorted({"tf32" if a == "tf32" else "ieee" for a in found}), len(found), same)
    if generic == "inherited":
        torch.backends.fp32_precision = "ieee"
        print(now())
"""


def test_torchs_products_have_the_precision_of_the_recurrent_ones():
    """In a process of its own, whose setting is found again. Another thread may read it by its older name meanwhile."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = interpreter.run(PRODUCTS, cwd=ROOT, environment=environment)
    each = ["ieee ieee 5 True", "tf32 tf32 5 True"]  # forward x; backward x, weight_ih, weight_hh in two parts
    assert done.stdout.splitlines() == [*6 * each, "ieee"], done.stderr


def test_layers_of_two_precisions_wait_for_each_other(monkeypatch):
    """The first to leave would else restore what the second needs, and the second the first one's, for good."""
    now = ["none"]
    monkeypatch.setattr(gpu, "_older_setting", lambda: None)
    monkeypatch.setattr(torch._C, "_get_fp32_precision_getter", lambda *_: now[0])
    monkeypatch.setattr(torch._C, "_set_fp32_precision_setter", lambda *names: now.__setitem__(0, names[-1]))
    entered, seen = threading.Event(), []

    def second():
        entered.wait()
        with gpu._products("ieee"):
            seen.append(now[0])

    thread = threading.Thread(target=second)
    thread.start()
    with gpu._products("tf32"):
        entered.set()
        thread.join(0.2)
        seen.append(now[0])
    thread.join()
    assert seen == ["tf32", "none"]
    assert now == ["none"]


def choose(name, device, dtype=torch.float32, **options):
    options = {"cell": cells.lstm, "masked": False, "inner_states": False} | options
    return dispatch.choose(name, torch.device(device), dtype, **options)


@pytest.fixture
def chip(monkeypatch):
    """Makes every CUDA device one of a compute capability, which nothing has warned of yet."""

    def become(*capability):
        monkeypatch.setattr(gpu, "capability", lambda device: capability)
        monkeypatch.setattr(dispatch, "_warned", set())

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    become(9, 0)
    return become


def test_the_ladder(chip):
    assert choose("auto", "cpu") == "numba"
    assert choose("auto", "cuda") == "triton"
    assert choose("auto", "cuda", torch.float64) == "aten"
    assert choose("auto", "cuda", torch.float64, masked=True) == "reference"
    with pytest.raises(RuntimeError, match="got torch"):
        choose("triton", "cuda", torch.float64)
    with pytest.raises(RuntimeError, match="no projections"):
        choose("triton", "meta", cell=cells.library.lstm_projected)


CHIPS = {"7.5": "T4", "8.0": "A100", "8.6": "RTX 30", "8.9": "RTX 40", "9.0": "H100", "10.0": "B200", "12.0": "RTX 50"}
LAYERS = {  # what a row of docs/gpu.md's table is about: the cell, its type and options of the layer
    "plain, 16 bits": (cells.lstm, torch.bfloat16, {}),
    "plain, `tf32`": (cells.lstm, "tf32", {}),
    "plain, `ieee`": (cells.lstm, "ieee", {}),
    "with lengths, 16 bits": (cells.lstm, torch.bfloat16, {"lengths": True}),
    "with resets, 16 bits": (cells.lstm, torch.bfloat16, {"reset": True}),
    "GRU, 16 bits": (cells.gru, torch.bfloat16, {}),
    "another cell, 16 bits": (cells.mgu, torch.bfloat16, {}),
    "another cell, `ieee`": (cells.mgu, "ieee", {}),
    "with means, 16 bits": (cells.dreamer_gru, torch.bfloat16, {}),
}
SIZES = (64, 128, 129, 1024)


def layer_of(cell, dtype, H, lengths=False, reset=False):
    """A layer without memory."""
    layer = Case(cell, T=2, B=3, I=40, H=H, zeros=True).layer
    masks = torch.zeros(3, dtype=torch.int64) if lengths else None, torch.zeros(2, 3).bool() if reset else None
    tensors = [a if a is None else torch.empty(a.shape, dtype=dtype, device="meta") for a in layer.tensors[:-2]]
    return Layer.of(cell, (*tensors, *masks), False)


def taken(kind, H):
    """What runs a layer: "one launch", "a launch a step", "torch" or "plain"."""
    cell, dtype, options = kind
    precision, dtype = (dtype, torch.float32) if isinstance(dtype, str) else ("native", dtype)
    layer = layer_of(cell, dtype, H, **options)
    name = choose("auto", "cuda", dtype, cell=cell, masked=bool(options), layer=layer)
    if name != "triton":
        return {"aten": "torch", "reference": "plain"}[name]
    _, tile, *_ = launch.describe_layer(layer, precision)
    return "one launch" if isinstance(tile, tiles.Resident) else "a launch a step"


def of_sizes(kind):
    """What runs layers of a kind, by size, as a cell of the table: "one launch; torch above 128"."""
    results = [taken(kind, H) for H in SIZES]
    parts = [results[0]] + [
        f"{result} above {SIZES[n] if n < 2 else 128}" for n, result in enumerate(results[1:]) if result != results[n]
    ]
    return "; ".join(parts)


@pytest.mark.filterwarnings("ignore:auto runs:RuntimeWarning")
def test_the_table_of_what_runs_where(chip, monkeypatch):
    """docs/gpu.md's own. Chips that run all layers alike share a column."""
    columns = {}
    for number, card in CHIPS.items():
        chip(*map(int, number.split(".")))
        column = []
        for kind in LAYERS.values():
            precision = kind[1] if isinstance(kind[1], str) else "native"
            monkeypatch.setattr("fastlstm.backends.triton.resolve_precision", lambda *_, p=precision: p)
            column.append(of_sizes(kind))
        columns.setdefault(tuple(column), []).append(f"{card} ({number})")
    lines = [["layer", *map(", ".join, columns.values())], *([name, *row] for name, row in zip(LAYERS, zip(*columns)))]
    wanted = ["| " + " | ".join(line) + " |" for line in lines]
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").splitlines()
    first = next((n for n, line in enumerate(text) if line.startswith("| layer |")), 0)
    assert [text[first], *text[first + 2 : first + 1 + len(wanted)]] == wanted, "\n".join(wanted)


@pytest.mark.parametrize("old", [True, False])
def test_a_device_that_has_no_kernels(chip, monkeypatch, old):
    """Lengths are packed for torch's own layer. What that lacks runs in plain PyTorch, and one warning says so."""
    chip(*((7, 5) if old else (9, 0)))
    if not old:
        monkeypatch.setattr(gpu, "import_failure", lambda: "the triton backend needs the package triton")
    reason = "needs compute capability 8.0, got 7.5" if old else "needs the package triton"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert choose("auto", "cuda", layer=layer_of(cells.lstm, torch.float32, 64)) == "aten"
            with_lengths = layer_of(cells.lstm, torch.float32, 64, lengths=True)
            assert choose("auto", "cuda", masked=True, layer=with_lengths) == "aten"
            assert choose("auto", "cuda", masked=True, layer=with_lengths, traced=True) == "reference"
            with_reset = layer_of(cells.lstm, torch.float32, 64, reset=True)
            assert choose("auto", "cuda", masked=True, layer=with_reset) == "reference"
            assert choose("auto", "cuda", cell=cells.mgu, layer=layer_of(cells.mgu, torch.float32, 64)) == "reference"
            assert choose("auto", "cuda", torch.float64, masked=True) == "reference"
    (message,) = (str(warning.message) for warning in caught if "auto runs" in str(warning.message))
    assert re.search(f"auto runs a layer of lstm in (plain PyTorch|torch's own layer), since .* {reason}", message)
    with pytest.raises(RuntimeError, match=f"the triton backend {reason}"):
        choose("triton-ieee", "cuda")


def test_the_command_says_why_no_kernels_run(chip, monkeypatch):
    chip(7, 5)
    for name, result in (("is_available", True), ("device_count", 1), ("get_device_name", "Tesla T4")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(gpu, "INTERPRET", False)
    found = fastlstm.info()
    assert found["auto"]["cuda"]["lstm"] == "aten"
    assert any("No kernels of this package run on the GPU" in note and "got 7.5" in note for note in found["notes"])


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
