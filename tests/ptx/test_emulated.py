"""The tests of emulated kernels, each file in a process of its own in which Triton compiles: see processes.py."""

import os

import pytest

from tests.helpers import ROOT, interpreter
from tests.ptx.processes import EMULATED, INTERPRETS, needs_triton

PARTS = [(name, "") for name in EMULATED]


def run(name, part, speed):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "0"}
    chosen = ["-k", part] * bool(part)
    arguments = f"tests/ptx/{name}", "-q", "-m", speed, "-p", "no:cacheprovider", *chosen
    done = interpreter.run_module("pytest", *arguments, environment=environment, cwd=ROOT, timeout=3600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@needs_triton
@pytest.mark.skipif(not INTERPRETS, reason="this process compiles, and so it collects the files themselves")
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_file(name, part):
    run(name, part, "not slow")
