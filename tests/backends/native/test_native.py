"""The native backend: its cells, its structures, every instruction set, and life without the library."""

import copy
import ctypes
import re
import runpy
import subprocess
import sys
import textwrap

import pytest
import torch

import fastlstm
from fastlstm import cells, lstm
from fastlstm.backends import csrc, dispatch
from tests.helpers import ROOT
from tests.helpers.layers import Layer, error, needs_native
from tests.helpers.modules import called, inputs_of, modules_of, results, same
from tests.helpers.native import SOURCES, instruction_sets
from tests.helpers.tolerances import close


def test_cells_h_is_what_generate_py_writes():
    written = runpy.run_path(str(SOURCES / "generate.py"))
    assert (SOURCES / "cells.h").read_text() == written["header"]()
    declared = re.search(r"enum fastlstm_cell \{([^}]*)\}", (SOURCES / "fastlstm.h").read_text())[1]
    numbers = {name.lower(): int(number) for name, number in re.findall(r"FASTLSTM_(\w+) = (\d+)", declared)}
    assert numbers == {cell.name: number for number, cell in enumerate(written["CELLS"])}
    assert tuple(csrc.CELLS) == written["CELLS"]
    assert [*csrc.CELLS.values()] == [*numbers.values()]


def test_the_generator_refuses_what_the_kernels_have_no_place_for():
    struct = runpy.run_path(str(SOURCES / "generate.py"))["struct"]
    for cell in (cells.peephole_lstm, cells.ind_rnn):
        with pytest.raises(ValueError, match=f"no place for what cell {cell.name} reads or carries"):
            struct(cell)


def test_cells_without_kernels_are_refused_by_their_names():
    """And not by the word with a digest that caches go by."""

    @cells.cell(gates={"a": "xh"}, states=("h",))
    def own(a):
        return cells.tanh(a)

    assert [dispatch.runs("native", cell) for cell in (cells.lstm, cells.gru, own)] == [True, True, False]
    with pytest.raises(RuntimeError, match=r"the native backend runs the cells lstm, gru, got own$"):
        fastlstm.RNN(own, 3, 5, backend="native")(torch.zeros(2, 1, 3))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("forward_args", csrc.FORWARD), ("backward_args", csrc.BACKWARD), ("threads", csrc.THREADS)],
)
def test_structures_are_those_of_the_header(name, layout):
    header = re.sub(r"/\*.*?\*/", "", (SOURCES / "fastlstm.h").read_text(), flags=re.DOTALL)
    body = re.search(rf"typedef struct \{{([^}}]*)\}} fastlstm_{name};", header)[1]
    fields = ""
    for declaration in body.split(";"):
        if "(*" in declaration:
            fields += "P"
        elif declaration.strip():
            kind = "P" if "*" in declaration else "q"
            assert kind == "P" or declaration.split()[0] == "int64_t"
            fields += kind * (declaration.count(",") + 1)
    written = re.sub(r"(\d+)q", lambda m: "q" * int(m[1]), layout.format).replace("@", "").replace(" ", "")
    assert fields == written


@needs_native
def test_versions_agree():
    declared = re.search(r"#define FASTLSTM_VERSION (\d+)", (SOURCES / "fastlstm.h").read_text())[1]
    assert csrc.VERSION == csrc.library.fastlstm_version() == int(declared)


@needs_native
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_of_this_processor(dtype, threads, kind, monkeypatch, two_threads):
    torch.set_num_threads(threads)
    for instructions in instruction_sets():
        monkeypatch.setattr(csrc, "instructions", instructions)
        for T, B, I, H in ((3, 7, 5, 9), (2, 13, 28, 40), (5, 70, 33, 100), (1, 64, 1, 2)):
            module, exact = modules_of(kind, "native", I, H, dtype)  # its plans fix their instruction set
            inputs = inputs_of(module, T, B)
            masks = {"lengths": torch.randint(0, T + 1, (B,)), "reset": torch.rand(T, B) < 0.3}
            directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
            got, want = (results(m, inputs, directions, **masks) for m in (module, exact))
            close(got, want, "long", where=f"{instructions}, {T}")
            with torch.no_grad():
                for _ in range(2):
                    assert same(called(module, inputs[0], inputs[1:], **masks), got[: len(directions)])


@needs_native
def test_the_library_has_threads_of_its_own(monkeypatch, two_threads):
    """Where torch brings no libgomp: the bits are the same."""
    module, found = fastlstm.LSTM(28, 100, backend="native"), []
    inputs = inputs_of(module, 9, 24)
    directions = [torch.randn_like(a) for a in called(module, inputs[0], inputs[1:])]
    for openmp in (csrc.openmp_functions(), None):
        monkeypatch.setattr(csrc, "openmp_functions", lambda found=openmp: found)
        csrc.threads_argument.cache_clear()
        module.release_memory()  # plans fix their pool
        found.append(results(module, inputs, directions))
    csrc.threads_argument.cache_clear()
    assert same(*found)


@needs_native
def test_threads_are_torchs_at_every_call(monkeypatch, set_threads):
    """Of calls by themselves, and of a module's, which follow plans."""
    used, call = [], csrc.call

    def counted(name, arguments, other):
        if name == "fastlstm_forward":
            used.append(csrc.THREADS.unpack(other)[0])
        call(name, arguments, other)

    monkeypatch.setattr(csrc, "call", counted)
    layer, module = Layer(3, 2, 5, 6), fastlstm.LSTM(5, 6, backend="native")
    inputs = layer.to(torch.float32, requires_grad=False)
    for count in (2, 1, 3, 1, 2):
        set_threads(count)
        layer.run(inputs, "native")
        with torch.no_grad():
            module(inputs[0])
    assert used == [2, 2, 1, 1, 3, 3, 1, 1, 2, 2]


@needs_native
@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        *[(0, 1, 1), (1, 7, 2), (2, 9, 4), (3, 2, 2), (3, -1, 2), (3, 1, 2), (4, 0, 2), (6, -1, 2), (5, 2**62, 2)],
        *[(9, 0, 2), (12, 0, 2), (30, 0, 2)],
    ],
)
def test_bad_arguments_give_an_error_code(field, value, code):
    """version, dtype, instructions, cell (of a GRU, which has no c), T, I, B, x, weight_ih and c_n."""
    assert csrc.library.fastlstm_forward(arguments_with(field, value), None) == code
    assert csrc.library.fastlstm_error_text(code)


@needs_native
@pytest.mark.parametrize(("field", "value", "code"), [(0, 1, 1), (1, 7, 2), (2, 9, 4), (5, -1, 2), (12, 0, 2)])
def test_steps_that_cannot_be_made_are_null(field, value, code):
    """A program may free them without having looked at the code. The fields: as above."""
    steps = ctypes.c_void_p(1)
    assert csrc.library.fastlstm_steps_make(arguments_with(field, value), None, ctypes.byref(steps)) == code
    assert steps.value is None
    csrc.library.fastlstm_steps_free(steps)


def arguments_with(field, value):
    """A fastlstm_forward_args of a small LSTM, one of whose fields has this value."""
    buffer = torch.empty(4096)
    values = [csrc.VERSION, 0, 0, 0, 2, 2, 2, 2, 0, *[buffer.data_ptr(), 4, 2], *[buffer.data_ptr(), 2] * 2]
    values += [0] * 6 + [buffer.data_ptr(), 2] * 2 + [0, 0] + [buffer.data_ptr()] * 3 + [0, 0]
    values[field] = value
    return csrc.FORWARD.pack(*values)


@needs_native
@pytest.mark.parametrize(
    ("name", "layout", "dtype", "of_bytes", "absent"),
    [
        ("forward", csrc.FORWARD, 0, [26], [18, 19, 20]),
        ("forward", csrc.FORWARD, 1, [26], [18, 19, 20]),
        ("forward", csrc.FORWARD, 2, [12, 14, 26], [20, 31, 32]),
        ("backward", csrc.BACKWARD, 0, [20], []),
        ("backward", csrc.BACKWARD, 1, [20], []),
    ],
    ids=["float32", "float64", "int8", "backward-float32", "backward-float64"],
)
def test_arrays_that_are_not_aligned_to_their_elements_are_refused(name, layout, dtype, of_bytes, absent):
    """Each array in its turn begins within an element. `of_bytes`: resets, and weights of int8. `absent`: packed
    weights, the scales of others than int8, and what int8 layers do not save.
    """
    fields = "".join(text[-1] * int(text[:-1] or 1) for text in re.findall(r"\d*[qP]", layout.format))
    memory, call = torch.zeros(len(fields), 512, dtype=torch.double), getattr(csrc.library, f"fastlstm_{name}")
    arrays = [k for k, field in enumerate(fields) if field == "P" and k not in absent]
    values = [csrc.VERSION, dtype, 0, 0, 2, 2, 2, 2, 0] + [2] * (len(fields) - 9)
    for k in arrays + absent:
        values[k] = memory[k].data_ptr() if k in arrays else 0
    assert call(layout.pack(*values), None) == 0
    for k in arrays:
        moved = [*values[:k], values[k] + (4 if dtype == 1 else 2), *values[k + 1 :]]
        assert call(layout.pack(*moved), None) == (0 if k in of_bytes else 2), k


@needs_native
def test_steps_of_arrays_that_are_not_aligned_are_refused():
    memory, steps = torch.zeros(5, 64), ctypes.c_void_p()
    assert csrc.library.fastlstm_steps_make(arguments_with(0, csrc.VERSION), None, ctypes.byref(steps)) == 0
    arrays = [row.data_ptr() for row in memory]
    assert csrc.library.fastlstm_step(steps, *map(ctypes.c_void_p, arrays)) == 0
    for k in range(5):
        moved = [address + 2 * (each == k) for each, address in enumerate(arrays)]
        assert csrc.library.fastlstm_step(steps, *map(ctypes.c_void_p, moved)) == 2
    csrc.library.fastlstm_steps_free(steps)


@needs_native
def test_a_tensor_that_is_not_aligned_raises():
    x = torch.frombuffer(bytearray(25), dtype=torch.float32, offset=1).view(2, 1, 3)
    with pytest.raises(RuntimeError, match=r"fastlstm_forward: .* or an array is not aligned"):
        fastlstm.LSTM(3, 5, backend="native")(x)


@needs_native
def test_a_stream_runs_after_the_end_of_the_main_thread():
    """Daemon threads and functions of `atexit` run then, after what their process has had the interpreter free."""
    code = """
        import atexit
        atexit.register(lambda: print(torch.equal(stream(x), expected)))  # runs last, since it is registered first
        import torch, fastlstm
        lstm, x = fastlstm.LSTM(512, 512, backend="native"), torch.randn(3, 512)
        stream, expected = lstm.stream(3), lstm.stream(3)(x)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", (done.returncode, done.stderr)


@needs_native
@pytest.mark.parametrize("kind", [fastlstm.LSTM, fastlstm.GRU])
@pytest.mark.parametrize("shared", [False, True])
def test_packed_weights_are_searched_for_changes(shared, kind, two_threads):
    """Every element of a bias, and a whole row or column of a weight; `shared` over two threads."""
    I, H = 5, 19
    module = kind(I, H, backend="native")
    x, *states = inputs_of(module, 1, 100 if shared else 1)
    changes = [(n, row) for n in range(4) for row in range(len(module.bias_ih_l0))]
    changes += [(n, (slice(None), column)) for n, size in ((0, I), (1, H)) for column in range(size)]
    with torch.no_grad():
        for n, index in changes:
            list(module.parameters())[n].data[index] += 1
            assert same(called(module, x, states), called(copy.deepcopy(module), x, states)), (n, index)


@needs_native
def test_rows_of_the_input_may_overlap():
    results, signal = [], torch.randn(40, dtype=torch.float64)
    weights = [torch.randn(28, k, dtype=torch.float64, requires_grad=True) for k in (5, 7)]
    for backend in ("native", "reference"):
        x = signal.clone().requires_grad_()
        output = lstm(x.unfold(0, 5, 1)[:30].unfold(0, 3, 1).mT, None, *weights, backend=backend)[0]  # (28, 3, 5)
        results.append([output, *torch.autograd.grad(output.square().sum(), [x, *weights])])
    for got, want in zip(*results):
        assert error(got, want.detach()) < 2.3e-14


@needs_native
def test_a_failing_call_raises(monkeypatch):
    module = fastlstm.LSTM(1, 1, backend="native")  # without plans, which fix their version
    monkeypatch.setattr(csrc, "VERSION", 99)
    with torch.no_grad(), pytest.raises(RuntimeError, match="fastlstm_pack: the structure is of another version"):
        module(torch.ones(2, 1, 1))
    with pytest.raises(RuntimeError, match="fastlstm_forward: the structure is of another version"):
        module(torch.ones(2, 1, 1))
