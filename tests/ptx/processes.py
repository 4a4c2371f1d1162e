"""Which tests run where. A process either interprets Triton's kernels or compiles them, from Triton's import on.

The suite's own process interprets, unless there is a GPU. So test_emulated.py runs the files of `EMULATED` in processes
that compile. In one of these, `TRITON_INTERPRET=0 python -m pytest tests/ptx`, they are ordinary tests.
"""

import importlib.util
import os

import pytest

EMULATED = [f"test_{name}.py" for name in ("layers", "cells", "grids", "mutants", "modules", "first_call")]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is made for Linux on x86-64")
on_each_chip = pytest.mark.parametrize("chip", [pytest.param(chip, id=f"sm_{chip}") for chip in (80, 90)])
