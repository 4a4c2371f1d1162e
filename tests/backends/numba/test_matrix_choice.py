"""When the Numba backend takes products of bfloat16: modules, exports, compiled code. How busy it is kept."""

import re
from fractions import Fraction

import pytest
import torch

import fastlstm
from benchmarks.model import assembly, busiest_loop
from fastlstm import lstm
from fastlstm.backends import dispatch, numba
from fastlstm.backends.numba.llvm import amx, bf16_dot, matrix
from fastlstm.cells import library
from tests.helpers.numba import PRECISIONS, needs_unit, run


@pytest.fixture
def setting():
    """Sets torch's precision for RNNs on CPUs, and puts it back."""
    rnn = torch.backends.mkldnn.rnn
    before = rnn.fp32_precision
    yield lambda precision: setattr(rnn, "fp32_precision", precision)
    rnn.fp32_precision = before


def choose(name, dtype):
    return dispatch.choose(name, torch.device("cpu"), dtype, cell=library.lstm, masked=False, inner_states=False)


@needs_unit
def test_which_tensors_take_its_products(setting):
    assert choose("auto", torch.float32) == choose("numba", torch.float32) == "numba"
    assert choose("auto", torch.float16) == "numba"
    assert choose("auto", torch.bfloat16) == choose("numba", torch.bfloat16) == "numba-bf16"
    x, module = torch.randn(3, 4, 5), fastlstm.LSTM(5, 6)
    plain = module(x)[0]
    with torch.no_grad():
        module(x)
    for precision, name in (("bf16", "numba-bf16"), ("tf32", "numba-bf16x3")):
        setting(precision)
        if numba.COMPONENTS[name.removeprefix("numba-")] > numba.max_components():
            name = "numba"
        assert choose("auto", torch.float32) == choose("numba", torch.float32) == name
        assert choose("auto", torch.bfloat16) == "numba-bf16"
        assert choose("auto", torch.float64) == "numba"
        with torch.no_grad():
            again, kept = module(x)[0], module(x)[0]
        assert torch.equal(again, kept)
        assert torch.equal(module(x)[0], kept)
        assert torch.equal(kept, plain) == (name == "numba")


@needs_unit
@pytest.mark.parametrize(("heads", "units", "takes"), [(2, 64, True), (3, 128, True), (2, 32, False), (2, 72, False)])
def test_heads_of_whole_vector_groups_take_its_products(heads, units, takes):
    x = torch.randn(3, 4, 5)
    outputs = []
    for backend in ("numba-bf16", "numba"):
        torch.manual_seed(0)
        outputs.append(fastlstm.RNN(library.slstm, 5, heads * units, heads=heads, backend=backend)(x)[0])
    assert torch.equal(*outputs) != takes


@needs_unit
@pytest.mark.parametrize("grad", [False, True])
def test_auto_multiplies_many_rows_in_pieces_unless_bits_matter(grad):
    if numba.COMPONENTS["bf16x6"] > numba.max_components():
        pytest.skip("the processor multiplies bfloat16 on vectors, and float32 in no pieces")
    module, x = fastlstm.LSTM(20, 70), torch.randn(9, 64, 20)

    def outputs(x, backend=None):
        module.backend = backend
        with torch.set_grad_enabled(grad):
            return module(x)[0].detach(), module(x)[0].detach()  # the second call follows a plan

    in_pieces, plain = outputs(x, "numba-bf16x6")[0], outputs(x, "numba")[0]
    assert not torch.equal(in_pieces, plain)
    torch.testing.assert_close(in_pieces, plain, rtol=0, atol=1e-6)  # a few roundings of values within 1
    for got in outputs(x):
        assert torch.equal(got, in_pieces)
    for few in (x[:, :63], x[:7]):
        assert torch.equal(outputs(few)[0], outputs(few, "numba")[0])
    small = fastlstm.LSTM(20, 31)
    with torch.no_grad():
        found = small(x)[0]
        small.backend = "numba"
        assert torch.equal(found, small(x)[0])
    with fastlstm.batch_invariant():
        for got in outputs(x):
            assert torch.equal(got, plain)
        assert torch.equal(outputs(x[:, 5:6])[0], plain[:, 5:6])
        with fastlstm.batch_invariant(False):
            assert torch.equal(outputs(x)[0], in_pieces)
        assert torch.equal(outputs(x)[1], plain)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(outputs(x)[0], plain)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(outputs(x)[1], in_pieces)


def test_asked_for_by_name(monkeypatch):
    x, *weights = torch.randn(2, 1, 3), torch.randn(4, 3), torch.randn(4, 1)
    for name in PRECISIONS:
        with pytest.raises(
            RuntimeError, match=rf"{name} backend needs float32, bfloat16 or float16, got torch\.float64"
        ):
            lstm(x.double(), None, *(w.double() for w in weights), backend=name)
    monkeypatch.setattr(numba, "max_components", lambda: 0)
    for name in PRECISIONS:
        with pytest.raises(RuntimeError, match=f"{name} backend needs a processor with AMX"):
            lstm(x, None, *weights, backend=name)
    assert choose("auto", torch.bfloat16) == "numba"


@needs_unit
@pytest.mark.parametrize("available", [pytest.param(True, marks=pytest.mark.slow), False])
def test_an_export_in_a_process_of_its_own(available, tmp_path):
    """A graph names its backend; whoever runs it may not have asked for the unit yet, or have none."""
    module, x = fastlstm.LSTM(5, 6).bfloat16(), torch.randn(3, 2, 5).bfloat16()
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "lstm.pt2")
    torch.save(x, tmp_path / "x.pt")
    code = f"""
        import torch
        import fastlstm
        from fastlstm.backends.numba.llvm import matrix
        {"" if available else "matrix.max_components = lambda: 0"}
        x = torch.load("x.pt")
        torch.save(torch.export.load("lstm.pt2").module()(x)[0].detach(), "output.pt")
    """
    run(code, tmp_path)
    # without the unit float32 arithmetic: eight bits of each factor are what the two may differ by
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), module(x)[0], rtol=0, atol=0 if available else 2e-2)


@needs_unit
def test_compiled_code_keeps_the_precision_it_was_compiled_with(setting):
    x, module = torch.randn(3, 4, 5), fastlstm.LSTM(5, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = compiled(x)[0]
    setting("bf16")
    assert torch.equal(compiled(x)[0], before)
    assert not torch.equal(module(x)[0], before)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0], module(x)[0])


# Of each group of tiles, by the number of components: how many products a step takes, and how many loads. A group has
# as many rows and columns of tiles as the comment says.
PRODUCTS_AND_LOADS = {  # 2 x 3, 2 x 2, 2 x 1, 1 x 4, 1 x 3, 1 x 2, 1 x 1
    "matrix1": [(6, 7), (4, 4), (2, 3), (4, 5), (3, 4), (2, 3), (1, 2)],
    "matrix2": [(18, 21), (12, 10), (6, 6), (12, 14), (9, 11), (6, 8), (3, 4)],
    "matrix3": [(36, 42), (24, 14), (12, 9), (24, 27), (18, 21), (12, 15), (6, 6)],
}


def test_the_unit_is_kept_busy():
    """A step of each group of tiles loads a factor no oftener than its products need, and stores nothing."""
    target = "x86_64-unknown-linux-gnu", "sapphirerapids"
    codes = assembly("+avx512f,+amx-tile,+amx-bf16", target, *PRODUCTS_AND_LOADS)
    for code, expected in zip(codes, PRODUCTS_AND_LOADS.values(), strict=True):
        body = code.split("\nmatrix_product:", 1)[1].split("\n.Lfunc_end", 1)[0]
        loops = [loop for _, loop in re.findall(r"^(\.L\w+):.*\n((?:\s.*\n)*?)\s+j\w+\s+\1$", body, re.MULTILINE)]
        steps = [loop for loop in loops if "tdpbf16ps" in loop]
        # the compiler may write out several steps of a group, with and without a last one
        shares = {Fraction(loop.count("tdpbf16ps"), loop.count("tileload")) for loop in steps}
        assert shares == {Fraction(*each) for each in expected}
        assert not any("tilestore" in loop for loop in steps)


@pytest.mark.parametrize(
    ("features", "bytes_", "expected"),
    [
        ("+avx512f,+avx512bf16,+amx-tile,+amx-bf16", 64, amx),
        ("+avx512f,+avx512bf16,+sse4a", 64, bf16_dot),
        ("+avx512f,+avx512bf16", 64, None),  # Intel's, at half of float32's rate
        ("+avx512f", 64, None),
        ("+avx2,+fma,+sse4a", 32, None),
    ],
)
def test_which_instructions_a_processor_takes(features, bytes_, expected, monkeypatch):
    monkeypatch.setattr(matrix, "machine_features", lambda: features)
    monkeypatch.setattr(matrix, "VECTOR_BYTES", bytes_)
    assert matrix.bf16_module() is expected


def test_vectors_are_kept_busy():
    """A pair of k takes as many products as there are sums in registers, and as few loads as its tile has sides."""
    target = "x86_64-unknown-linux-gnu", "sapphirerapids"  # not every LLVM knows AMD's
    (code,) = assembly("+avx512f,+avx512bf16,+sse4a", target, "matrix1")
    loop = busiest_loop(code, "dots6x4", "vdpbf16ps")
    assert sum("vdpbf16ps" in line for line in loop) == 24
    assert sum("broadcast" in line for line in loop) == 6
    assert not [line for line in loop if "rsp" in line]
