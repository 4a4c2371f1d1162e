"""csrc/ as a C program uses it: the example against Python, its binary, bad files, and everything under sanitizers."""

import ast
import functools
import gzip
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastlstm import cells, export
from fastlstm.backends import native
from fastlstm.backends.base import Layer
from fastlstm.mnist import data, saved
from fastlstm.mnist.model import RowLSTM
from fastlstm.mnist.state import State
from fastlstm.mnist.training import Recipe, evaluate, train
from tests.helpers import ROOT, interpreter
from tests.helpers.native import SOURCES
from tests.helpers.pages import blocks
from tests.helpers.tolerances import close

COMPILERS = os.name != "nt" and shutil.which("gcc") and shutil.which("g++")  # csrc/ is not for Windows
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="builds C and C++ with gcc, which is not installed")
FLAGS = (
    "-ffp-contract=off",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-asynchronous-unwind-tables",
    "-Wall",
    "-Wextra",
    "-Werror",
)
AVX2, AVX512 = ["-mavx2", "-mfma"], ["-mavx512f", "-mavx512dq", "-mavx512vl"]
MACHINE = {
    "x86_64": {"avx2": AVX2, "avx512": AVX512, "int8_avx2": AVX2, "int8_avx512": [*AVX512, "-mavx512vnni"]},
    "aarch64": {"int8_dotprod": ["-march=armv8.2-a+dotprod"]},
}
PROCESSOR = platform.machine()
LEAVE_OUT = ("-Wl,-dead_strip",) if sys.platform == "darwin" else ("-Wl,--as-needed", "-Wl,--gc-sections", "-Wl,-s")
SANITIZE, RACES = (
    ("-O1", "-g", f"-fsanitize={names}", "-fno-sanitize-recover=all") for names in ("address,undefined", "thread")
)
HALF = ("-DKIND_STEP=3",)  # half of the cases, for programs that take many times as long
GCC = ("gcc",), ("g++",)


def compiled(folder, sources, options, compilers, processor):
    """The object files of these sources."""
    cc, cxx = compilers
    objects = []
    for source in sources:
        out = folder / f"{source.stem}.o"
        c = source.suffix == ".c"
        machine = MACHINE.get(processor, {}).get(source.stem, [])
        compiler = [*cc, "-std=c11"] if c else [*cxx, "-std=c++17", *FLAGS[: 3 if source.parent == SOURCES else 1]]
        subprocess.run([*compiler, *options, *FLAGS[3:], *machine, "-c", source, "-o", out], check=True)
        objects.append(out)
    return objects


def compiled_library(folder, options, compilers=GCC, processor=PROCESSOR):
    return compiled(folder, sorted(SOURCES.glob("*.cpp")), options, compilers, processor)


def build(folder, program, options, compilers=GCC, processor=PROCESSOR, library=None):
    """The program, linked with every file of the library compiled with `options`."""
    objects = library or compiled_library(folder, options, compilers, processor)
    objects = objects + compiled(folder, [SOURCES / program], options, compilers, processor)
    path = folder / objects[-1].stem
    subprocess.run([*compilers[1], *options, *objects, "-pthread", *LEAVE_OUT, "-o", path], check=True)
    return path


@pytest.fixture(scope="module")
def build_sanitized(tmp_path_factory):
    """Does as `build`, and compiles the library once for all programs of the same options."""

    @functools.cache
    def library(options):
        return compiled_library(tmp_path_factory.mktemp("sanitized"), options)

    return lambda folder, program, options: build(folder, program, options, library=library(options))


def build_example(folder, level):
    options = level, "-ffunction-sections", "-fdata-sections"  # what it does not call is left out
    return build(folder, "examples/mnist.c", options)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return build_example(tmp_path_factory.mktemp("example"), "-O0")  # in a third of the time that -O2 takes


def model_file(folder, model, *options):
    """What fastlstm.train writes of this model, exported."""
    saved.save(folder / "model.pt", model, (28, model.lstm.input_size))
    assert export.main([*options, str(folder / "model.pt"), str(folder / "row_lstm.flstm")]) == 0
    return folder / "row_lstm.flstm"


def classes(example, path, images, batch, threads):
    """The classes that the program finds, of every image."""
    command = example, path, images, str(batch), str(threads)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return torch.tensor([int(line) for line in done.stdout.split()])


def quantized(model, images, activations):
    """The logits of a model with int8 weights, from the exporter's rounding and the native backend."""
    content, (H, I, C) = export.model_bytes(model.state_dict(), True, f"int{activations}"), (128, 28, 10)
    floats = np.frombuffer(content, "<f4", 12 * H + C * (H + 1), 32)
    numbers = np.frombuffer(content, "i1", 4 * H * (I + H), 32 + floats.nbytes)
    scale_ih, scale_hh, bias = torch.tensor(floats[: 12 * H]).view(3, 4 * H)
    weight_ih, weight_hh = (torch.tensor(a) for a in np.split(numbers, [4 * H * I]))
    weights, x = (weight_ih.view(4 * H, I), weight_hh.view(4 * H, H), bias, None), images.transpose(0, 1).contiguous()
    options = {"scales": (scale_ih, scale_hh), "activations": activations}
    layer = Layer(x, weights, (None, None), None, None, False, cells.lstm, **options)
    return model.linear(native.forward(layer, False).last[0])


@needs_compiler
@pytest.mark.slow
def test_the_example_is_small(tmp_path):
    assert build_example(tmp_path, "-O2").stat().st_size < 500_000  # four instruction sets, each of floats and of int8
    assert len((SOURCES / "examples/mnist.c").read_text().splitlines()) < 100


@needs_compiler
@pytest.mark.parametrize(("count", "most"), [(300, 9), pytest.param(10_000, 150, marks=pytest.mark.slow)])
def test_the_example_reads_test_images_as_python_does(example, tmp_path, count, most):
    mnist = data.load()
    model = RowLSTM(generator=torch.Generator().manual_seed(1))
    train(State(model, Recipe(iterations=25)), mnist.train)
    want = evaluate(model, mnist).predictions[:count]
    images, content = tmp_path / "images", gzip.decompress((data.EMBEDDED / f"{data.FILES[2]}.gz").read_bytes())
    images.write_bytes(content[:4] + struct.pack(">I", count) + content[8 : 16 + count * 28 * 28])
    path = model_file(tmp_path, model)
    for batch, threads in ((128, 1), (1000, 2)):
        assert torch.equal(classes(example, path, images, batch, threads), want)
    for activations in (8, 16):
        path = model_file(tmp_path, model, "--int8", "--activations", f"int{activations}")
        with torch.no_grad():
            rounded = quantized(model, mnist.test.images[:count], activations).argmax(1)
        assert (rounded != want).sum() <= most  # the model has barely been trained
        for batch, threads in ((128, 1), (1000, 2)):
            assert torch.equal(classes(example, path, images, batch, threads), rounded)


def run(example, folder, text):
    """What a C program prints that is compiled as the page on native does it."""
    (folder / "program.c").write_text(text)
    library = [path for path in example.parent.glob("*.o") if path.name != "mnist.o"]
    link = ("-pthread", "-Wl,--as-needed,--gc-sections", "-o", "program")
    options = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-s", "-I", SOURCES)
    subprocess.run(["gcc", *options, "program.c", *library, *link], cwd=folder, check=True)
    return subprocess.run([folder / "program"], cwd=folder, capture_output=True, text=True, check=True).stdout


@needs_compiler
def test_the_program_of_the_page_answers_as_python_does(example, tmp_path):
    found = blocks("docs/native.md")
    code = "".join(block.text for block in found if block.language == "python")
    done = interpreter.run(code, cwd=tmp_path, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    (program,) = [block.text for block in found if block.text.startswith("/* classify.c */")]
    assert ast.literal_eval(done.stdout) == [int(line) for line in run(example, tmp_path, program).split()]


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(PROCESSOR != "x86_64", reason="the page compiles the kernels of x86-64")
@pytest.mark.skipif(shutil.which("git") is None, reason="asks git which files it ignores")
def test_what_the_page_makes_is_ignored_by_git(tmp_path):
    """The page's commands run as they stand, its files written where they are mentioned."""
    for name in ("csrc", "fastlstm", "docs/native.md", ".gitignore"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    git = functools.partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    git(["git", "init"])
    git(["git", "add", "."])
    writes, lines = {"python": "cat >> model.py", "c": "cat > classify.c"}, []
    for language, text in blocks("docs/native.md"):
        if language == "python" or text.startswith("/* classify.c */"):
            lines += [f"{writes[language]} <<'END'", text + "END", *["python model.py"] * ("x.bin" in text)]
        elif language == "bash":
            lines.append(text)
    folder, variables = os.path.dirname(sys.executable), {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **variables, "PATH": os.pathsep.join((folder, os.environ["PATH"]))}
    done = subprocess.run(
        ["sh", "-e"], input="\n".join(lines), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers, classes = done.stdout.partition("4\n1\n4\n")[::2]
    assert "4, 1, 4" in answers
    assert len(re.findall(r"^\d$", classes, re.MULTILINE)) == 10_000
    assert git(["git", "ls-files", "--others", "--exclude-standard"]).stdout == ""


GRU_PROGRAM = """
#include <stdio.h>
#include <string.h>
#include "fastlstm.h"
enum {{ T = 5, B = 2, I = 3, H = 4, G = 3 * H }};
static float x[T * B * I], weight_ih[G * I], weight_hh[G * H], bias_ih[G], bias_hh[G], h[T * B * H], h_n[B * H];
static int read_step(float *x_t) {{
    static int t = 0;
    if (t < T) memcpy(x_t, x + t * B * I, B * I * sizeof(float));
    return t++ < T;
}}
int main(void) {{
    float *arrays[] = {{x, weight_ih, weight_hh, bias_ih, bias_hh}};
    size_t sizes[] = {{T * B * I, G * I, G * H, G, G}};
    FILE *file = fopen("arrays.bin", "rb");
    for (int k = 0; k < 5; k++)
        if (!file || fread(arrays[k], sizeof(float), sizes[k], file) != sizes[k]) return 1;
    fclose(file);
    fastlstm_threads threads = {{1, NULL, NULL}};
    {call}
    for (int k = 0; k < T * B * H; k++) printf("%.9g\\n", h[k]);
    for (int k = 0; k < B * H; k++) printf("%.9g\\n", h_n[k]);
    float x_t[B * I], states[2][B * H] = {{{{0}}}}, *h_t = states[0], *h_next = states[1], *c_t = NULL;
    {steps}
    for (int k = 0; k < B * H; k++) printf("%.9g\\n", h_t[k]);
    return code;
}}
"""


@needs_compiler
def test_the_calls_of_a_layer_and_of_its_steps_on_the_page_are_torchs_gru(example, tmp_path):
    starts = {"call": "fastlstm_forward_args", "steps": "fastlstm_steps *steps"}
    found = [block.text for block in blocks("docs/native.md")]
    parts = {name: next(text for text in found if text.startswith(start)) for name, start in starts.items()}
    gru, x = torch.nn.GRU(3, 4), torch.randn(5, 2, 3)
    arrays = [x, *(parameter.detach() for parameter in gru.parameters())]
    (tmp_path / "arrays.bin").write_bytes(b"".join(array.numpy().tobytes() for array in arrays))
    printed = run(example, tmp_path, GRU_PROGRAM.format(**parts))
    with torch.no_grad():
        output, last = gru(x)
        want = torch.cat([part.flatten() for part in (output, last, last)])
    close(torch.tensor([float(line) for line in printed.split()]), want, "values")


@pytest.fixture(params=[(), ("--int8",), ("--int8", "--activations", "int16")], ids=["float32", "int8", "int8-int16"])
def small(tmp_path, request):
    return model_file(tmp_path, RowLSTM(3, 5, 4), *request.param)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b"x" + b[1:], "not a fastlstm model"),
        (lambda b: b"", "not a fastlstm model"),
        (lambda b: b[:20], "truncated"),
        (lambda b: b[:-1], "truncated"),
        (lambda b: b + b"x", "truncated"),
        (lambda b: b[:8] + struct.pack("<I", 3) + b[12:], "newer"),
        (lambda b: b[:12] + struct.pack("<I", 0) + b[16:], "corrupt"),
        (lambda b: b[:16] + struct.pack("<I", 2**31) + b[20:], "corrupt"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "corrupt"),
    ],
)
def test_a_bad_file_is_refused_with_a_reason(example, small, change, words):
    small.write_bytes(change(small.read_bytes()))
    done = subprocess.run([example, small, small], capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stderr


@needs_compiler
@pytest.mark.parametrize(("place", "value"), [(28, 0), (28, 9), (-1, 128)])  # bits of activations; a weight of -128
def test_numbers_that_cannot_be_are_refused(example, tmp_path, place, value):
    path = model_file(tmp_path, RowLSTM(3, 5, 4), "--int8")
    content = bytearray(path.read_bytes())
    content[place] = value
    content[24:28] = struct.pack("<I", zlib.crc32(content[28:]))
    path.write_bytes(content)
    done = subprocess.run([example, path, path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "corrupt" in done.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "cannot be opened"),
        *(
            (make, "a folder, a pipe or a device, and not of a file")
            for make in (Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/null"))
        ),
    ],
    ids=["nothing", "folder", "pipe", "device"],
)
def test_what_is_no_file_is_told_apart(example, tmp_path, make, words):
    """A pipe to which nobody writes is not waited for."""
    path = tmp_path / "model"
    make(path)
    done = subprocess.run([example, path, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert words in done.stderr


def test_the_exported_file(small, request):
    content, int8 = small.read_bytes(), "int8" in request.node.callspec.id
    magic, version, I, H, C, checksum = struct.unpack("<8s5I", content[:28])
    assert (magic, version, I, H, C) == (b"fastlstm", 2 if int8 else 1, 3, 5, 4)
    assert checksum == zlib.crc32(content[28:])
    weights, linear = 4 * 5 * (3 + 5), 4 * (5 + 1)
    if int8:
        assert struct.unpack("<I", content[28:32])[0] == (16 if "int16" in request.node.callspec.id else 8)
        assert len(content) == 32 + 4 * (3 * 4 * 5 + linear) + weights
    else:
        assert len(content) == 28 + 4 * (weights + 4 * 5 + linear)


def test_export_refuses_other_shapes_and_nan():
    state = RowLSTM(3, 5, 4).state_dict()
    with pytest.raises(ValueError, match="state_dict must hold"):
        export.model_bytes({**state, "linear.weight": torch.zeros(4, 6)})
    with pytest.raises(ValueError, match="state_dict must hold"):
        export.model_bytes({})
    state["lstm.weight_hh_l0"][2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"lstm\.weight_hh_l0 must be finite"):
        export.model_bytes(state, True)


@needs_compiler
@pytest.mark.parametrize("program", ["checks/matrix.cpp", "checks/quantized.cpp", "benchmarks/steps.cpp"])
def test_the_programs_that_run_seldom_follow_the_header(program):
    source = SOURCES / program
    subprocess.run(["g++", "-std=c++17", *FLAGS[3:], "-fsyntax-only", source], check=True)


@needs_compiler
@pytest.mark.slow
def test_ten_thousand_mutated_files_under_sanitizers(build_sanitized, small, tmp_path):
    program = build_sanitized(tmp_path, "checks/fuzz.c", SANITIZE)
    seed = int(torch.randint(2**31, ()))
    done = subprocess.run([program, small, "10000", str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    counts = {int(code): int(count) for code, count in (line.split() for line in done.stdout.splitlines())}
    assert set(counts) == {0, 6, 7, 8, 9}  # every outcome of fastlstm_model_read but a lack of memory
    assert min(counts.values()) > 50


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("check", "options"),
    [
        ("matrix", SANITIZE),
        ("quantized", SANITIZE),
        ("quantized", (*SANITIZE, "-DFASTLSTM_EMULATE_TILES")),
        ("matrix", RACES),
        ("quantized", RACES),
    ],
    ids=["floats", "int8", "int8-tiles", "floats-races", "int8-races"],
)
def test_all_kernels_under_sanitizers(build_sanitized, tmp_path, check, options):
    program = build_sanitized(tmp_path, f"checks/{check}.cpp", (*options, *HALF))
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


ON_ARM = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.slow
@pytest.mark.skipif(not all(map(shutil.which, ON_ARM)), reason=f"needs {', '.join(ON_ARM)}; `make test-arm` has them")
@pytest.mark.parametrize(
    ("check", "processor", "sets"),
    [("matrix", "max,pauth=off", 2), ("quantized", "max,pauth=off", 3), ("quantized", "cortex-a72", 3)],
)
def test_all_kernels_on_arm(tmp_path, check, processor, sets):
    """`FASTLSTM_BASE` is NEON, and `FASTLSTM_BEST` of int8 weights sdot, which the last processor lacks."""
    undefined = "-fsanitize=undefined", "-fno-sanitize-recover=all", "-static"
    gcc, gxx, qemu = ON_ARM
    program = build(tmp_path, f"checks/{check}.cpp", ("-O2", *undefined, *HALF), ((gcc,), (gxx,)), "aarch64")
    done = subprocess.run([qemu, "-cpu", processor, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith(f"instruction sets {sets}, 0 failures\n")
