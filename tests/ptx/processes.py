"""Which tests run where. A process either interprets Triton's kernels or compiles them, from Triton's import on.

The suite's own process interprets, unless there is a GPU. So test_emulated.py runs the files of `EMULATED` in processes
that compile. In one of these, `TRITON_INTERPRET=0 python -m pytest tests/ptx`, they are ordinary tests.
"""

import importlib.util
import os
from importlib import metadata

import pytest

EMULATED = [
    "test_layers.py",
    "test_cells.py",
    "test_mutants.py",
    "test_modules.py",
    "test_first_call.py",
]
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
TRIED = INSTALLED and tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 9)  # older ones emit other PTX
needs_triton = pytest.mark.skipif(not TRIED, reason="needs Triton 3.9, which is made for Linux on x86-64")
on_each_chip = pytest.mark.parametrize("chip", [pytest.param(chip, id=f"sm_{chip}") for chip in (80, 90)])
