"""Kernels of every kind stay within the memory that is theirs: `tests.helpers.guarded` runs them."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.system() != "Linux", reason="takes the place of functions of Linux's C library"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="builds C with gcc, which is not installed"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("guard") / "guard.so"
    source = ROOT / "tests/helpers/guard.c"
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", source, "-o", path, "-ldl"], check=True)
    return path


@pytest.mark.parametrize("first", range(2))
def test_no_kernel_leaves_its_memory(library, first):
    """Every second case has the same kinds of layers, so that each kind is compiled in one process."""
    command = sys.executable, "-m", "tests.helpers.guarded", str(first), "160", "2"
    done = subprocess.run(
        command, env=os.environ | {"LD_PRELOAD": str(library)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-2000:])
