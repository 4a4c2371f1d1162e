"""The tests of emulated kernels, in processes of their own in which Triton compiles: see processes.py."""

import os

import pytest

from tests.helpers import ROOT, interpreter
from tests.ptx.processes import EMULATED, INTERPRETS, needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not INTERPRETS, reason="this process compiles, and collects the files themselves"),
]


def run(names, speed):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "0"}
    files = [f"tests/ptx/{name}" for name in names]
    arguments = *files, "-q", "-m", speed, "-p", "no:cacheprovider"
    done = interpreter.run_module("pytest", *arguments, environment=environment, cwd=ROOT, timeout=3600)
    assert done.returncode in (0, 5), done.stdout[-5000:] + done.stderr[-2000:]  # 5: a file has no such tests


def test_files():
    """In one process, as Triton and the emulator take more than a second to start."""
    run(EMULATED, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", EMULATED)
def test_slow_tests_of_file(name):
    run([name], "slow")
