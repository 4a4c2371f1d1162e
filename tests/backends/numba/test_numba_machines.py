"""The Numba backend on machines that this one is not, and where things are missing:
other vector units, no cache, no OpenMP.
"""

import os
import platform
import shutil
import subprocess
import zipfile

import pytest
import torch

import fastlstm
from benchmarks.model import assembly, busiest_loop
from fastlstm.backends import cpu
from fastlstm.backends.numba.host import tasks
from fastlstm.backends.numba.llvm.simd import machine_features
from fastlstm.backends.numba.llvm.sources import fingerprint
from tests.helpers import ROOT
from tests.helpers.layers import Layer, error
from tests.helpers.numba import run
from tests.helpers.threads import replaced

MACHINE = platform.machine().lower()
needs_x86 = pytest.mark.skipif(MACHINE not in ("x86_64", "amd64"), reason="names an x86-64 processor")
CHECK = """
    import sys, torch
    from fastlstm.backends.numba.llvm import simd
    from tests.helpers.layers import compare, draws, error
    from tests.helpers.numba import ROWS, largest_error
    torch.set_num_threads(2)
    dtype, bound = {"float32": (torch.float32, 6e-6), "float64": (torch.float64, 1e-12)}[sys.argv[1]]
    for vectors in (1, 2, 3, 4):
        assert max(largest_error(dtype, vectors, rows) for rows in ROWS) < 2 * bound
    for size in ((3, 7, 5, 9), (2, 13, 28, 40), (1, 1, 1, 1), (3, 8, 5, 9), (9, 1, 30, 20)):
        for name, got, want in compare(draws(*size, masked=True), dtype, "numba"):
            assert error(got, want) < bound, name
    print(simd.VECTOR_BYTES, simd.TILE_ROWS)
"""


@pytest.mark.slow
@needs_x86
@pytest.mark.parametrize(("features", "tile_rows"), [("", "3"), ("+neon", "6")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_processor_with_no_more_than_sse2(tmp_path, dtype, features, tile_rows):
    """Also the loops that NEON has, which LLVM translates for any processor."""
    environment = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(CHECK, arguments=(dtype,), **environment).split() == ["16", tile_rows]


@pytest.mark.skipif("+avx2" not in machine_features().split(","), reason="the processor has no AVX2")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_a_processor_with_no_more_than_avx2(dtype):
    """Its kernels stay in the cache that is used, where no other processor takes them."""
    features = "+avx,+avx2,+fma,+sse4.2,+popcnt,+bmi,+bmi2"
    output = run(CHECK, arguments=(dtype,), NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES=features)
    assert output.split() == ["32", "3"]


HOST = """
    import sys
    import llvmlite.binding as llvm
    llvm.get_host_cpu_features = lambda: llvm.FeatureMap({each: True for each in sys.argv[2:]})
    llvm.get_process_triple = lambda: sys.argv[1]
    import fastlstm
    from fastlstm.backends.numba.llvm import simd
    print(simd.VECTOR_BYTES, simd.TILE_ROWS, fastlstm.info()["instructions"]["numba"])
"""


@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("arm64-apple-darwin23.6.0", (), "16 6 neon"),  # of a Mac LLVM lists none
        ("aarch64-unknown-linux-gnu", ("neon", "fp-armv8"), "16 6 neon"),
        ("x86_64-apple-darwin23.6.0", ("sse2",), "16 3 base"),
        ("x86_64-pc-windows-msvc", ("sse2", "avx2", "fma"), "32 3 avx2"),
    ],
)
def test_tiles_follow_the_host(triple, features, expected):
    assert run(HOST, arguments=(triple, *features)).strip() == expected


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, which interpreters with this directory in their path import."""
    shutil.copytree(os.path.dirname(fastlstm.__file__), tmp_path / "fastlstm")
    return tmp_path / "fastlstm"


def add_to_output(copy):
    source = copy / "cells" / "library.py"
    text = source.read_text().replace("return o * tanh(c), c\n", "return o + tanh(c), c\n")
    assert text != source.read_text()
    source.write_text(text)


def test_sources_in_an_archive(tmp_path):
    """Python imports the package from one. What is cached follows the sources there too."""
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for path in (ROOT / "fastlstm").rglob("*.py"):
            archive.write(path, path.relative_to(ROOT))
    code = """
        import fastlstm
        from fastlstm.backends.numba.llvm.sources import fingerprint
        print(fastlstm.__file__, fingerprint())
    """
    path, number = run(code, tmp_path, PYTHONPATH=archive.filename).split()
    assert path == os.path.join(archive.filename, "fastlstm", "__init__.py")
    assert number == str(fingerprint())


@pytest.mark.slow
@needs_x86
def test_another_process_finds_what_was_compiled(copy, tmp_path):
    """Also what only a processor with a matrix unit runs, and nothing of other sources."""
    code = """
        import sys
        from fastlstm import cells
        from fastlstm.backends.numba.host import tasks
        tasks.table_of(cells.gru, 4)
        names = sys.argv[1:] or [*tasks.KERNELS, *tasks.tables]
        print(all([tasks._compiled(name).is_loaded for name in names]), *names)
    """
    processor = {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": "+avx512f,+amx-tile,+amx-bf16"}
    environment = {**processor, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    (first, *names), (second, *_) = (run(code, tmp_path, **environment).split() for _ in range(2))
    add_to_output(copy)
    small = "region", "stack"
    others = run(code, tmp_path, arguments=small, **environment).split()
    again = run(code, tmp_path, arguments=small, **environment).split()
    assert (first, second) == ("False", "True")
    assert (others, again) == (["False", *small], ["True", *small])
    assert {"matrix3", "primitives4", "region", "stack", "backward_matrix"} <= set(names)


@pytest.mark.parametrize(
    ("features", "target", "fma", "tiles"),
    [
        ("+avx512f,+avx2,+fma", ("x86_64-unknown-linux-gnu", "skylake-avx512"), "vfmadd", (6, 8, 12, 16)),
        ("+avx2,+fma", ("x86_64-unknown-linux-gnu", "haswell"), "vfmadd", (3, 4, 6, 12)),
        ("+neon", ("aarch64-unknown-linux-gnu", "neoverse-n1"), "fmla", (6, 8, 12, 16)),
    ],
    ids=["avx512", "avx2", "neon"],
)
def test_the_tiles_stay_in_registers(features, target, fma, tiles):
    """The inner loops hold all their accumulators and touch no stack, on every vector unit there are tiles for."""
    binding = pytest.importorskip("llvmlite.binding")
    if target[0].startswith("aarch64") and binding.llvm_version_info[0] < 20:
        pytest.skip("LLVM before 20, as numba 0.61 has it, spills there")
    (code,) = assembly(features, target, "primitives")
    for rows, vectors in zip(tiles, (4, 3, 2, 1)):
        loop = busiest_loop(code, f"tile{vectors}x{rows}", fma)
        multiply_adds = sum(fma in line for line in loop)
        assert multiply_adds >= rows * vectors
        assert multiply_adds % (rows * vectors) == 0
        assert not [line for line in loop if "rsp" in line or "[sp" in line]


ON_ARM = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(
    not all(map(shutil.which, ON_ARM)), reason=f"needs {' and '.join(ON_ARM)}; `make test-arm` has them"
)
def test_primitives_on_arm(tmp_path):
    """Every tile and every number of panels, beside plain loops in double."""
    compiler, emulator = ON_ARM
    (code,) = assembly("+neon", ("aarch64-unknown-linux-gnu", "neoverse-n1"), "primitives")
    program, source = tmp_path / "primitives", tmp_path / "primitives.s"
    source.write_text(code)
    command = [compiler, "-O1", "-march=armv8.2-a", "-static", ROOT / "tests/arm/primitives.cpp", source, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([emulator, program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "8608 cases, 0 failures\n")


@pytest.mark.parametrize(
    ("features", "target"),
    [
        pytest.param(
            "+avx512f,+amx-tile,+amx-bf16", ("x86_64-unknown-linux-gnu", "sapphirerapids"), marks=pytest.mark.slow
        ),
        ("+neon", ("aarch64-unknown-linux-gnu", "neoverse-n1")),
    ],
    ids=["amx", "neon"],
)
def test_all_kernels_compile(features, target):
    """Also those of a matrix unit, of which `test_matrix_choice` compiles the instructions."""
    code = f"""
        import llvmlite.binding as llvm
        from llvmlite import ir
        from fastlstm.backends.numba.host import tasks
        from fastlstm.backends.numba.llvm.translate import fields_of, run
        from fastlstm.backends.numba.llvm.simd import I64
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        triple, cpu = {target}
        machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features="{features}", opt=1)
        for name, (kernel, struct, known) in tasks.KERNELS.items():
            module = ir.Module(name)
            module.triple = triple
            task = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 3), "task")
            b = ir.IRBuilder(task.append_basic_block())
            run(b, kernel, fields_of([field for field, _ in struct._fields_], known), *task.args)
            b.ret_void()
            parsed = llvm.parse_assembly(str(module))
            parsed.verify()
            print(name, "task:" in machine.emit_assembly(parsed))
    """
    output = run(code, NUMBA_CPU_FEATURES=features, NUMBA_CPU_NAME=target[1]).splitlines()
    assert output == [f"{name} True" for name in tasks.KERNELS]


def test_without_openmp(two_threads):
    """Where torch brings no libgomp, plain Python threads run the same team: the bits are the same."""
    layer = Layer(9, 24, 28, 100)
    results = []
    for openmp in (cpu.openmp(), None):
        with replaced(cpu, openmp=lambda found=openmp: found):
            inputs = layer.to(torch.float32)
            outputs = layer.run(inputs, "numba")
            grads = torch.autograd.grad(outputs, inputs, [g.float() for g in layer.gradients])
        results.append([*outputs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert error(results[0][0], layer.truth(layer.to(torch.double))[0]) < 4e-6
