"""A numba that is missing or cannot be used: `auto` goes on without it and says so; by name it is the error."""

import compileall
import os
import shutil
import sys

import pytest

from fastlstm.backends import csrc
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import UNAVAILABLE

ATEN = "aten instead, and reference for what aten lacks"
NEXT = "native instead" if UNAVAILABLE["native"] is None else ATEN
UNUSABLE = "the numba backend cannot use the numba that is installed: "
BROKEN = {  # a numba's source, and what the reason has to hold
    "too old": ("raise ImportError('Numba needs NumPy 2.9 or less')", "ImportError: Numba needs NumPy 2.9 or less"),
    "too new": ("__version__ = '9.0'", "ImportError: cannot import name 'types' from 'numba'"),
    "damaged": ("raise OSError('libllvmlite.so: file too short')", "OSError: libllvmlite.so: file too short"),
}
CODE = """
    import sys, warnings
    import torch, fastlstm

    assert "numba" not in sys.modules
    x = torch.randn(3, 2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            lstm = fastlstm.LSTM(4, 5)
            output = lstm(x)[0]
            output.sum().backward()
            with torch.no_grad():
                results = output, lstm(x)[0], lstm(x, lengths=[3, 3])[0]
            with fastlstm.use_backend("reference"):
                for result in results:
                    torch.testing.assert_close(result, lstm(x)[0])
    for warning in caught:
        print(warning.category.__name__, warning.message)
    print(fastlstm.info()["auto"]["cpu"]["lstm"])
    for name in sys.argv[1:] * 2:
        try:
            fastlstm.LSTM(4, 5, backend=name)(x)
        except RuntimeError as error:
            print(error)
"""
COMPILED = """
    import warnings
    import torch, fastlstm

    lstm, x = fastlstm.LSTM(4, 5), torch.randn(3, 2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = torch.compile(lstm, backend="eager", fullgraph=True)(x)[0]
    assert torch.equal(got, lstm(x)[0])
    print(sum("cannot use the numba" in str(warning.message) for warning in caught), "warning")
"""
MISSING = """
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *a: None if name == "numba" else find(name, *a)
"""


def run(code, folder, *backends, source=None, **variables):
    """The lines that a process prints which finds packages in a folder first."""
    if source is not None:
        (folder / "numba").mkdir()
        (folder / "numba" / "__init__.py").write_text(f"print('numba is imported')\n{source}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **variables}
    return interpreter.run(code, *backends, cwd=folder, environment=environment, check=True).stdout.splitlines()


@pytest.mark.parametrize("how", BROKEN)
def test_auto_goes_on_with_one_warning(tmp_path, how):
    source, reason = BROKEN[how]
    tried, warned, taken, *raised = run(CODE, tmp_path, "numba", source=source)
    assert tried == "numba is imported"
    assert warned.startswith(f"RuntimeWarning {UNUSABLE}")
    assert warned.endswith(f"; auto takes {NEXT}")
    assert NEXT.startswith(taken)
    assert len(raised) == 2
    assert all(line.startswith(UNUSABLE) for line in raised)
    assert all(reason in line for line in (warned, *raised))


def test_numba_that_may_not_compile(tmp_path):
    reason = f"{UNUSABLE}ImportError: the setting NUMBA_DISABLE_JIT forbids it to compile"
    warned, taken, *raised = run(CODE, tmp_path, "numba", NUMBA_DISABLE_JIT="1")
    assert warned == f"RuntimeWarning {reason}; auto takes {NEXT}"
    assert NEXT.startswith(taken)
    assert raised == [reason] * 2


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("how", ["too old", "missing"])
def test_one_warning_with_both_reasons(tmp_path, how, is_there):
    """By a copy of the package whose native library is missing or of no use."""
    shutil.copytree(ROOT / "fastlstm", tmp_path / "fastlstm")
    library = tmp_path / "fastlstm" / csrc.LIBRARY.name
    library.unlink(missing_ok=True)
    if is_there:
        library.write_bytes(b"no library")
    if how == "missing":
        lines, reason = run(MISSING + CODE, tmp_path, "native"), "the numba backend needs numba, which is not installed"
    else:
        _, *lines = run(CODE, tmp_path, "native", source=BROKEN[how][0])
        reason = f"{UNUSABLE}{BROKEN[how][1]}"
    warned, taken, *refused = lines
    assert warned.startswith(f"RuntimeWarning {reason}; the native backend")
    assert warned.endswith(f"; auto takes {ATEN}")
    assert taken == "aten"
    assert len(refused) == 2
    for message in (warned, *refused):
        assert ("cannot be loaded" if is_there else "needs _native") in message


def test_compiled(tmp_path):
    assert run(COMPILED, tmp_path, source=BROKEN["too old"][0]) == ["numba is imported", "1 warning"]


def test_an_installation_without_sources(tmp_path):
    """Kernels are compiled from sources, which some installations leave out to be smaller."""
    shutil.copytree(ROOT / "fastlstm", tmp_path / "fastlstm", ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(tmp_path, legacy=True, quiet=1)
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    warned, _, *raised = run(CODE, tmp_path, "numba")
    reason = (
        "ImportError: kernels are compiled from their sources, and fastlstm.cells.derive is installed without its own"
    )
    assert warned.endswith(f"{reason}; auto takes {NEXT}")
    assert len(raised) == 2
    assert all(line.endswith(reason) for line in raised)
