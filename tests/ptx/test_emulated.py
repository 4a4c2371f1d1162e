"""The tests of emulated kernels, in processes of their own in which Triton compiles.

There, as in `TRITON_INTERPRET=0 python -m pytest tests/ptx`, they are ordinary tests.
"""

import importlib.util
import os
from importlib import metadata

import pytest

from tests.helpers import ROOT, interpreter

EMULATED = ["test_layers.py", "test_mutants.py"]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
TRIED = INSTALLED and tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 9)  # older ones emit other PTX


@pytest.mark.skipif(not TRIED, reason="needs Triton 3.9, which is made for Linux on x86-64")
@pytest.mark.skipif(not INTERPRETS, reason="this process compiles, and collects the files themselves")
@pytest.mark.parametrize("speed", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_files(speed):
    """In one process, as Triton and the emulator take more than a second to start."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "0"}
    arguments = *(f"tests/ptx/{name}" for name in EMULATED), "-q", "-m", speed, "-p", "no:cacheprovider"
    done = interpreter.run_module("pytest", *arguments, environment=environment, cwd=ROOT, timeout=3600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
