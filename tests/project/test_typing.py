"""What type checkers make of a user's program: tests/project/typing/user.py holds the types that they have to find."""

import os
import re
import subprocess
import sys

import pytest

import fastlstm
from fastlstm import cells, convert
from tests.helpers import ROOT
from tests.helpers.pages import documented

PROGRAM = "tests/project/typing/user.py"


def check(*command):
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", *command, PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", [fastlstm, cells, convert], ids=lambda module: module.__name__)
def test_the_program_uses_every_public_name(module):
    words = set(re.findall(r"\w+", (ROOT / PROGRAM).read_text(encoding="utf-8")))
    assert [name for name in module.__all__ if name not in words] == []


def test_the_program_uses_every_integration():
    words = set(re.findall(r"fastlstm\.integrations\.\w+", (ROOT / PROGRAM).read_text(encoding="utf-8")))
    shown = {".".join(name.split(".")[:3]) for name in documented("docs/api/integrations.md")}
    assert shown - words == {"fastlstm.integrations.places"}  # whose class users meet in errors and in the reference


@pytest.mark.slow
def test_mypy():
    pytest.importorskip("mypy", reason="mypy, of the extra `test`, is not installed")
    check("mypy", "--config-file=", "--cache-dir=.mypy_cache/user", "--strict", "--follow-imports=silent")


@pytest.mark.slow  # it needs half a minute
def test_pyright():
    pytest.importorskip("pyright", reason="pyright, of the extra `test`, is not installed")
    check("pyright", "--pythonpath", sys.executable, "--outputjson")  # which looks for no newer version of itself
