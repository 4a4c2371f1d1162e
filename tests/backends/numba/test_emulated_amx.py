"""Products of bfloat16 on the tiles of AMX where a processor has none: see `tests.helpers.emulated_amx`."""

import os
import shutil
import subprocess
import sys

import pytest

from fastlstm.backends.numba.llvm import amx, matrix
from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES
from tests.helpers import ROOT

pytestmark = [
    pytest.mark.skipif(VECTOR_BYTES != 64, reason="the layouts of AMX need vectors of 64 bytes"),
    pytest.mark.skipif(matrix.bf16_module() is amx, reason="the processor has AMX, which the same tests run on"),
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="the emulation needs a C compiler"),
]
TESTS = ("numba/test_matrix.py", "numba/test_bfloat16.py", "test_properties.py")


@pytest.mark.parametrize("selected", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_tests_of_the_unit_pass_on_emulated_tiles(selected, tmp_path):
    files = [f"tests/backends/{name}" for name in TESTS]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.helpers.emulated_amx",
        "-m",
        selected,
        *files,
        "-k",
        "not native and (bf16 or sixteen or matrix or bfloat16)",
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
