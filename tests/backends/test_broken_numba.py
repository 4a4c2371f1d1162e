"""A numba that is installed and cannot be used: `auto` goes on without it and says so; by name it is the error."""

import compileall
import os
import shutil
import sys

import pytest

from tests.helpers import ROOT, interpreter
from tests.helpers.layers import UNAVAILABLE

NEXT = "native instead" if UNAVAILABLE["native"] is None else "aten instead, and reference for what aten lacks"
BROKEN = {  # a numba's source, and what the reason has to hold
    "too old": ("raise ImportError('Numba needs NumPy 2.9 or less')", "ImportError: Numba needs NumPy 2.9 or less"),
    "too new": ("__version__ = '9.0'", "ImportError: cannot import name 'types' from 'numba'"),
    "damaged": ("raise OSError('libllvmlite.so: file too short')", "OSError: libllvmlite.so: file too short"),
}
CODE = """
    import sys, warnings
    import torch, fastlstm

    assert "numba" not in sys.modules
    print("fastlstm is imported")
    x = torch.randn(3, 2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            lstm = fastlstm.LSTM(4, 5)
            got = lstm(x)[0]
            with torch.no_grad():
                assert torch.equal(lstm(x)[0], got)
            with fastlstm.use_backend("reference"):
                torch.testing.assert_close(got, lstm(x)[0])
            got.sum().backward()
    for warning in caught:
        print("warned", warning.category.__name__, warning.message)
    for _ in range(2):
        try:
            fastlstm.LSTM(4, 5, backend="numba")(x)
        except RuntimeError as error:
            print("raised", error)
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


def run(code, folder, source=None):
    if source is not None:
        (folder / "numba").mkdir()
        (folder / "numba" / "__init__.py").write_text(f"print('numba is imported')\n{source}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return interpreter.run(code, cwd=folder, environment=environment, check=True).stdout.splitlines()


@pytest.mark.parametrize("how", BROKEN)
def test_auto_goes_on_with_one_warning(tmp_path, how):
    source, reason = BROKEN[how]
    imported, tried, warned, *raised = run(CODE, tmp_path, source)
    assert imported == "fastlstm is imported"
    assert tried == "numba is imported"
    assert warned.startswith("warned RuntimeWarning the numba backend cannot use the numba that is installed: ")
    assert warned.endswith(f"; auto takes {NEXT}")
    assert reason in warned
    assert len(raised) == 2
    assert all("raised the numba backend cannot use the numba that is installed: " in line for line in raised)
    assert all(reason in line for line in raised)


def test_compiled(tmp_path):
    assert run(COMPILED, tmp_path, BROKEN["too old"][0]) == ["numba is imported", "1 warning"]


def test_an_installation_without_sources(tmp_path):
    """Kernels are compiled from sources, which some installations leave out to be smaller."""
    shutil.copytree(ROOT / "fastlstm", tmp_path / "fastlstm", ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(tmp_path, legacy=True, quiet=1)
    for path in tmp_path.rglob("*.py"):
        path.unlink()
    _, warned, *raised = run(CODE, tmp_path)
    reason = (
        "ImportError: kernels are compiled from their sources, and fastlstm.cells.derive is installed without its own"
    )
    assert warned.endswith(f"{reason}; auto takes {NEXT}")
    assert len(raised) == 2
    assert all(line.endswith(reason) for line in raised)
