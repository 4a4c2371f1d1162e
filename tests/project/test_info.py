"""What `python -m fastlstm` and `fastlstm.info` say, what warming up compiles, and what is said meanwhile."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastlstm
from fastlstm.__main__ import lines, main
from fastlstm.backends import csrc, dispatch, numba
from fastlstm.backends.numba.host import kernel_files, tasks
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import NOT_BUILT

KEYS = ["versions", "processor", "instructions", "gpus", "default", "auto", "backends", "caches", "notes"]
WAITING = "fastlstm compiles its kernels for this processor, which takes seconds; "


def test_the_dictionary_is_plain(set_threads):
    set_threads(3)
    found = fastlstm.info()
    assert found["processor"]["threads"] == 3
    assert list(found) == KEYS
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["fastlstm"] == fastlstm.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["backends"]) == [*dispatch.FUSED, "aten"]
    assert found["backends"]["reference"] is None
    assert list(found["auto"]["cpu"]) == [cell.key for cell in fastlstm.cells.CELLS]


def test_a_backend_that_cannot_run_has_the_reason_of_its_error(monkeypatch):
    monkeypatch.setattr(csrc, "reason", "the native backend needs a loom")
    found = fastlstm.info()
    assert found["backends"]["native"] == "the native backend needs a loom"
    assert found["instructions"]["native"] is None
    with pytest.raises(RuntimeError, match="the native backend needs a loom"):
        fastlstm.LSTM(3, 4, backend="native")(torch.zeros(2, 1, 3))


def test_the_command_prints_what_the_function_returns(capsys):
    assert main([]) == 0
    found, text = fastlstm.info(), capsys.readouterr().out
    assert text.splitlines() == list(lines(found))
    for backend, reason in found["backends"].items():
        assert re.search(rf"^  {backend} +{re.escape(reason or 'runs')}$", text, re.MULTILINE)
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-size", "3"], "--hidden-size: must be given with --warm-up, got --hidden-size alone"),
        (["--warm-up", "--json"], "--json: must be left out with --warm-up, got both"),
        (["--warm-up", "--input-size", "0"], "--input-size: must be a whole number from 1 to 2147483647, got '0'"),
        (["--warm-up", "--cell", "lmu"], "--cell: invalid choice: 'lmu' .*"),
        (["--warm-up", "--dtype", "int8"], "--dtype: invalid choice: 'int8' .*"),
        (["--warm-up", "--cell", "mgu", "--backend", "native"], "--backend: the native backend .*"),
    ],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert re.fullmatch(rf"python -m fastlstm: error: argument {message}\n", streams.err)


def test_warming_up_takes_sizes_cells_and_types(capsys):
    sizes = ["--input-size", "3", "--hidden-size", "5", "--batch-size", "2"]
    options = ["--cell", "gru", "lif", "--dtype", "float32", "float64", "--backend", "reference"]
    assert main(["--warm-up", *sizes, *options]) == 0
    *ready, kept = capsys.readouterr().out.splitlines()
    layers, dtypes = ("gru of 3 inputs", "lif of 0 inputs"), ("float32", "float64")
    told = [f"{layer} and 5 units in {dtype}" for layer in layers for dtype in dtypes]
    assert [line.partition(":")[0] for line in ready] == told
    assert all(re.fullmatch(r"[^:]*: reference is ready after \d+\.\d s", line) for line in ready)
    assert fastlstm.info()["caches"]["numba"] is None or kept.endswith(fastlstm.info()["caches"]["numba"])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="is about the cache of triton")
def test_the_folder_of_tritons_cache_is_told_if_it_can_be_written(monkeypatch, tmp_path):
    for name in ("TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    assert fastlstm.info()["caches"]["triton"] == str(tmp_path / "home/.triton/cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert fastlstm.info()["caches"]["triton"] == str(tmp_path / "cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file/cache"))
    assert fastlstm.info()["caches"]["triton"] is None


def environment(**variables):
    """This process's, without what would choose a backend or keep a process quiet."""
    mine = {name: value for name, value in os.environ.items() if name not in ("FASTLSTM_BACKEND", "FASTLSTM_QUIET")}
    return {**mine, "PYTHONPATH": os.pathsep.join(sys.path), **variables}


WARMED = """
    from fastlstm.__main__ import main
    assert main(["--warm-up"]) == 0
    from fastlstm.backends.numba.host.tasks import compiled_functions
    print(*(name for name, function in compiled_functions.items() if not function.is_loaded))
"""


@pytest.mark.slow  # it compiles all kernels of the LSTM
def test_after_warming_up_nothing_is_compiled(tmp_path):
    """Other processes have compiled all kernels, and the first one has loaded them."""
    variables = environment(NUMBA_CACHE_DIR=str(tmp_path))
    warmed = interpreter.run(WARMED, cwd=ROOT, environment=variables, check=True)
    *_, kept, own = warmed.stdout.splitlines()
    folder = kept.split()[-1]
    assert folder.startswith(str(tmp_path))
    assert warmed.stderr in ("", f"{WAITING}later processes load them from {folder}\n")
    assert torch.get_num_threads() == 1 or own in ("", "region both")  # of which one thread has no need
    kernels = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")}
    assert kernels
    assert interpreter.run(WARMED, cwd=ROOT, environment=variables, check=True).stderr == ""
    code = """
        import torch, fastlstm
        lstm = fastlstm.LSTM(7, 9, num_layers=2, bidirectional=True)
        with torch.no_grad():
            lstm(torch.randn(5, 3, 7))
        lstm(torch.randn(1, 130, 7))[0].sum().backward()
        fastlstm.LSTM(28, 128)(torch.randn(1, 1, 28))[0].sum().backward()
    """
    done = interpreter.run(code, cwd=ROOT, environment=variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")} == kernels


@pytest.mark.slow  # it compiles kernels
@pytest.mark.skipif(os.name == "nt", reason="sends a signal to a group of processes")
def test_ctrl_c_ends_all_processes_that_compile(tmp_path):
    cells = ["lstm", "gru", "peephole_lstm", "layer_norm_lstm", "layer_norm_gru", "slstm", "mgu", "cifg", "lem"]
    command = [sys.executable, "-m", "fastlstm", "--warm-up", "--cell", *cells]  # far more than the first of them
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    variables = environment(NUMBA_CACHE_DIR=str(tmp_path), FASTLSTM_QUIET="1")
    running = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True, **streams)
    while running.poll() is None and not any(tmp_path.rglob("*.kernel")):  # until the first of them is kept
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGINT)
    assert running.communicate(timeout=60) == ("", "interrupted\n")  # when none has the streams open any more
    assert running.returncode == 130


@pytest.mark.skipif(sys.platform != "linux", reason="only forked processes have what this one has patched")
@pytest.mark.skipif(numba.cache_folder() is None, reason="without a folder for the cache no process is begun")
def test_an_error_of_a_process_that_compiles_is_raised(monkeypatch, two_threads):
    def compiled(signature, function):
        raise NotImplementedError("a kernel says what none may say")

    monkeypatch.setattr(kernel_files, "load", lambda name: None)
    monkeypatch.setattr(tasks, "compiled", compiled)
    monkeypatch.setattr(tasks, "compiled_functions", {})  # earlier tests may have left all of them there
    with pytest.raises(NotImplementedError, match="a kernel says"):
        main(["--warm-up", "--backend", "numba"])


# A first call that compiles the kernels whose names begin so, in the time of loading, and loads others in over a second
FIRST_CALL = """
    import io, json, os, sys, threading, time, torch, fastlstm
    from fastlstm.backends.numba.host import kernel_files, tasks
    load = kernel_files.load
    def compile_and_store(name):
        tasks.compiled_functions[name] = load(name)
    def start(thread):
        raise RuntimeError("can't start new thread")
    tasks.compile_and_store = compile_and_store
    kernel_files.load = lambda name: None if name.startswith({compiled!r}) else time.sleep(1.2) or load(name)
    stderr = sys.stderr
    {change}
    for _ in range(2):
        fastlstm.LSTM(3, 4, backend="numba")(torch.zeros(2, 1, 3))
    print(end=json.dumps(sys.stderr.getvalue()) if isinstance(sys.stderr, io.StringIO) else "")
    sys.stderr = stderr
"""
ALL = "primitives", "cell", "forward"


@pytest.fixture(scope="module")
def first_call():
    """Makes a first call after a change of what it finds. Returns what was printed."""

    def call(compiled, change="pass", **variables):
        code = FIRST_CALL.format(compiled=compiled, change=change)
        return interpreter.run(code, cwd=ROOT, environment=environment(**variables), check=True)

    code = (
        'import torch, fastlstm; fastlstm.LSTM(3, 4, backend="numba")(torch.zeros(2, 1, 3))'  # so that files are there
    )
    interpreter.run(code, cwd=ROOT, environment=environment(FASTLSTM_QUIET="1"), check=True)
    return call


@pytest.mark.parametrize(
    ("compiled", "variables", "count"),
    [
        (ALL, {}, 1),
        (ALL, {"FASTLSTM_QUIET": "1"}, 0),
        pytest.param(("forward",), {"FASTLSTM_QUIET": "0"}, 1, marks=pytest.mark.slow),
        (("cell",), {}, 0),
        ((), {}, 0),
    ],
    ids=["long", "quiet", "not quiet", "short", "none"],
)
def test_a_long_compilation_is_told_once(first_call, compiled, variables, count):
    """However long it takes to load other kernels."""
    done = first_call(compiled, **variables)
    assert done.stdout == ""
    assert done.stderr.count("\n") == count
    assert done.stderr.startswith(WAITING * count)


def test_on_a_terminal_it_is_said_what_is_compiled_and_what_is_left(first_call):
    done = first_call(ALL, "sys.stderr = io.StringIO(); sys.stderr.isatty = lambda: True")
    first, _, rewritten = json.loads(done.stdout).partition("\n")
    assert first.startswith(WAITING)
    steps = ["compiling primitives; 2 left: cell, forward", "compiling cell; 1 left: forward", "compiling forward", ""]
    assert [line.strip() for line in rewritten.split("\r")[1::2]] == steps


@pytest.mark.parametrize("quiet", ["0", "1"])
@pytest.mark.parametrize(
    "change",
    [
        "threading.Thread.start = start",
        "sys.stderr = None",
        "sys.stderr = open(os.devnull, 'w'); sys.stderr.close()",
        pytest.param(
            "sys.stderr = open('/dev/full', 'w', buffering=1)",
            marks=pytest.mark.skipif(
                not os.path.exists("/dev/full"), reason="the system has no disk that is always full"
            ),
        ),
    ],
)
def test_what_a_compilation_has_to_say_stops_no_call(first_call, change, quiet):
    """Without threads, and on a stream that is missing, closed or full."""
    assert first_call(ALL, change, FASTLSTM_QUIET=quiet).stdout == ""


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory):
    """A copy of the package that numba can write no cache for, even as root: a file stands where each folder would."""
    folder = tmp_path_factory.mktemp("nowhere")
    shutil.copytree(ROOT / "fastlstm", folder / "fastlstm", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "fastlstm/backends/numba/host/__pycache__").touch()
    (folder / "file").touch()
    variables = dict.fromkeys(("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"), str(folder / "file"))
    path = os.pathsep.join([str(folder), *sys.path])
    return environment(**variables) | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


WITHOUT = """
    import json, torch, fastlstm
    x = torch.randn(3, 2, 4)
    lstm, same = fastlstm.LSTM(4, 5), fastlstm.LSTM(4, 5, backend={backend!r})
    same.load_state_dict(lstm.state_dict())
    assert torch.equal(lstm(x)[0], same(x)[0])
    print(json.dumps(fastlstm.info()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="where numba keeps its cache is told apart by the system")
def test_without_a_folder_for_the_cache_auto_takes_native(nowhere, tmp_path):
    taken = "native" if NOT_BUILT is None else "numba"
    done = interpreter.run(WITHOUT.format(backend=taken), cwd=tmp_path, environment=nowhere, check=True)
    found = json.loads(done.stdout)
    assert found["caches"]["numba"] is None
    assert found["backends"]["numba"] is None
    assert [found["auto"]["cpu"][cell] for cell in ("lstm", "gru", "mgu")] == [taken, taken, "numba"]
    (note,) = [note for note in found["notes"] if note.startswith("No folder for numba's cache can be written: ")]
    assert ("auto takes native" in note) == (taken == "native")
    assert note.endswith(f" NUMBA_CACHE_DIR names {nowhere['NUMBA_CACHE_DIR']}, where this user cannot write.")
    if taken == "native":
        assert done.stderr == ""  # and nothing was compiled


@pytest.mark.slow  # it compiles all kernels of the LSTM
@pytest.mark.skipif(sys.platform != "linux", reason="where numba keeps its cache is told apart by the system")
def test_without_a_folder_for_the_cache_numba_runs_by_name(nowhere, tmp_path):
    done = interpreter.run(WITHOUT.format(backend="numba").replace("torch.equal(", "torch.allclose("), cwd=tmp_path,
                           environment=nowhere)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr in ("", f"{WAITING}no folder can be written to keep them in\n")
