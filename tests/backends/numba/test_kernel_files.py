"""The files of compiled kernels: what is damaged is compiled again, what cannot be written is used all the same."""

import os
import random
import shutil
import signal
import sys

import pytest

from fastlstm.backends.numba.host import kernel_files, tasks
from fastlstm.backends.numba.llvm.simd import machine_features
from tests.helpers import ROOT, interpreter

FAULT = "fastlstm: {}: {}"
# The two smallest kernels: they print whether these were loaded
BEGIN = """
    import os, signal, sys, torch
    from fastlstm.backends.numba.host import kernel_files, tasks
"""
LOAD = """
    tasks.prepare(["stack", "region"])
    print(*(kernel.is_loaded for kernel in tasks.compiled_functions.values()))
"""
COMPILED, LOADED = "False False\n", "True True\n"


def run(code, folder, *arguments, check=True, timeout=300, **variables):
    """What a new process prints whose kernels are in `folder`."""
    mine = {name: value for name, value in os.environ.items() if name not in ("FASTLSTM_BACKEND", "FASTLSTM_QUIET")}
    variables = {**mine, "PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_CACHE_DIR": str(folder), **variables}
    return interpreter.run(code, *arguments, cwd=ROOT, environment=variables, check=check, timeout=timeout)


def files(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder with the two kernels."""
    folder = tmp_path_factory.mktemp("compiled")
    assert run(BEGIN + LOAD, folder).stderr == ""
    return folder


@pytest.fixture
def folder(compiled, tmp_path):
    """A copy of it."""
    shutil.copytree(compiled, tmp_path / "copy")
    return tmp_path / "copy"


def with_one_bit_changed(content, byte):
    return content[:byte] + bytes([content[byte] ^ 4]) + content[byte + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "cut short": lambda content: content[: len(content) // 2],
    "a bit of the first bytes": lambda content: with_one_bit_changed(content, 9),
    "a bit of the digest": lambda content: with_one_bit_changed(content, 40),
    "a bit of the code": lambda content: with_one_bit_changed(content, len(content) * 2 // 3),
}


@pytest.mark.parametrize("damages", list(zip(*[iter(DAMAGES)] * 2)), ids=" and ".join)
def test_damaged_files_are_compiled_again(folder, damages):
    """Each of the kernels' files has a damage of its own."""
    paths = files(folder)
    for path, damage in zip(paths, damages, strict=True):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    lines = [FAULT.format(path, "is damaged; the kernel is compiled again") for path in paths]
    first = run(BEGIN + LOAD, folder)
    assert first.stdout == COMPILED
    assert sorted(first.stderr.splitlines()) == sorted(lines)
    again = run(BEGIN + LOAD, folder)
    assert (again.stdout, again.stderr) == (LOADED, "")


def test_every_bit_of_a_file_counts(tmp_path, monkeypatch):
    kernel = tasks._compiled("stack")
    monkeypatch.setattr(kernel_files, "folder", lambda: tmp_path)
    monkeypatch.setattr(kernel_files, "QUIET", True)
    kernel_files.store("stack", tasks.compiled(*tasks._to_compile("stack")))
    (path,) = files(tmp_path)
    content = path.read_bytes()
    assert kernel_files.load("stack").is_loaded
    assert kernel_files.load("stack").address not in (0, kernel.address)
    for byte in random.Random(0).sample(range(len(content)), 500):
        path.write_bytes(with_one_bit_changed(content, byte))
        assert kernel_files.load("stack") is None


@pytest.mark.skipif(os.name == "nt", reason="reads of a folder and writes to its name fail with other words there")
def test_what_is_no_file_is_told_once(folder):
    first, second = files(folder)
    for path in (first, second):
        path.unlink()
    first.mkdir()
    second.symlink_to(second.name)
    done = run(BEGIN + LOAD, folder)
    reasons = {first: "Is a directory", second: "Too many levels of symbolic links"}
    lines = [
        FAULT.format(path, f"cannot be read ({why}); the kernel is compiled again") for path, why in reasons.items()
    ]
    assert done.stdout == COMPILED
    assert sorted(done.stderr.splitlines()) == sorted(lines)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes in folders")
def test_a_call_waits_for_no_file(folder):
    """Neither for what writes to a pipe, nor for more bytes than memory has."""
    pipe, large = files(folder)
    for path in (pipe, large):
        path.unlink()
    os.mkfifo(pipe)
    with open(large, "wb") as file:
        file.truncate(1 << 40)  # of which the disk holds none
    done = run(BEGIN + LOAD, folder, timeout=60)
    reasons = {pipe: "Not a regular file", large: "File too large"}
    lines = [
        FAULT.format(path, f"cannot be read ({why}); the kernel is compiled again") for path, why in reasons.items()
    ]
    assert done.stdout == COMPILED
    assert sorted(done.stderr.splitlines()) == sorted(lines)
    assert run(BEGIN + LOAD, folder).stdout == LOADED


FULL = """
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))  # bytes of a file, as a full disk or a quota would end it
"""


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files by what Unix has")
def test_a_full_disk_stops_no_call(compiled, tmp_path):
    done = run(FULL + BEGIN + LOAD, tmp_path)
    assert files(tmp_path) == []
    words = "cannot be written (File too large); later processes compile the kernel again"
    (place,) = tmp_path.iterdir()
    assert done.stdout == COMPILED
    assert sorted(done.stderr.splitlines()) == [FAULT.format(place / path.name, words) for path in files(compiled)]


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files by what Unix has")
def test_nothing_is_told_if_nothing_is_to_be_told(tmp_path):
    done = run(FULL + BEGIN + LOAD, tmp_path, FASTLSTM_QUIET="1")
    assert (done.stdout, done.stderr, files(tmp_path)) == (COMPILED, "", [])


HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2,+popcnt,+bmi,+bmi2"}
needs_avx2 = pytest.mark.skipif("+avx2" not in machine_features().split(","), reason="the processor has no AVX2")


@pytest.mark.parametrize(
    "other", [pytest.param(HASWELL, marks=needs_avx2), {"NUMBA_OPT": "0"}, {"NUMBA_DEBUGINFO": "1"}], ids=min
)
def test_two_kinds_of_code_share_a_folder(tmp_path, other):
    """Of two processors, or of two settings of numba. Neither loads the other, also where it lies under its name."""

    def printed():
        return [run(BEGIN + LOAD, tmp_path, **kind).stdout for kind in ({}, other) * 2]

    assert printed() == [COMPILED] * 2 + [LOADED] * 2
    contents = {path: path.read_bytes() for path in files(tmp_path)}
    for first, second in (list(contents)[:2], list(contents)[2:]):  # files of one kernel
        first.write_bytes(contents[second])
        second.write_bytes(contents[first])
    assert printed() == [COMPILED] * 2 + [LOADED] * 2
    assert {path: path.read_bytes() for path in files(tmp_path)} == contents


@pytest.mark.parametrize(
    "setting", ["NUMBA_NUM_THREADS", "NUMBA_DISABLE_CUDA", "NUMBA_DISABLE_PERFORMANCE_WARNINGS", "NUMBA_DUMP_IR"]
)
def test_settings_that_change_no_code_compile_nothing(compiled, setting):
    assert run(BEGIN + LOAD, compiled, **{setting: "1"}).stdout == LOADED


TIMED = """
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))  # a signal that nobody handles
"""
KILLED_BEFORE_RENAMING = """
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="signals end a process of Linux")
def test_a_process_that_is_killed_leaves_what_works(tmp_path):
    for delay in (0.1, 0.3, 0.6):
        run(BEGIN + TIMED + LOAD, tmp_path, delay, check=False)
    assert run(BEGIN + KILLED_BEFORE_RENAMING + LOAD, tmp_path, check=False).returncode in (0, -signal.SIGKILL)
    run(BEGIN + LOAD, tmp_path)
    done = run(BEGIN + LOAD, tmp_path)
    assert (done.stdout, done.stderr) == (LOADED, "")


FORK = """
    wait = lambda children: [os.waitpid(child, 0)[1] for child in children]
    children = []
    while len(children) < 3 and (not children or children[-1]):  # children have the last entry 0
        children.append(os.fork())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_processes_that_compile_at_once(tmp_path):
    code = (
        BEGIN + FORK + LOAD + "    assert not children[-1] or not any(os.waitpid(child, 0)[1] for child in children)\n"
    )
    assert run(code, tmp_path).stderr == ""
    assert run(BEGIN + LOAD, tmp_path).stdout == LOADED
    assert len(files(tmp_path)) == 2


THREADS = """
    from tests.helpers.threads import at_once
    compiled, compile_one = [], tasks.compiled
    tasks.compiled = lambda *arguments: compiled.append(arguments) or compile_one(*arguments)
    at_once(*[lambda: tasks.prepare(["stack", "region"])] * 6)
    assert len(compiled) == 2
"""
NOT_KEPT = """
    kernel_files.folder = lambda: None
"""


@pytest.mark.parametrize("before", ["", NOT_KEPT], ids=["kept", "not kept"])
def test_of_threads_that_want_a_kernel_one_compiles_it(tmp_path, before):
    done = run(BEGIN + before + THREADS + LOAD, tmp_path)
    assert (done.stdout, done.stderr, len(files(tmp_path))) == (COMPILED, "", 0 if before else 2)
