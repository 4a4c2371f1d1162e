"""The GPU benchmark as far as it goes without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[1],
    )


def test_help():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


def test_dry_run_outside_the_interpreter_is_refused():
    done = run("--dry-run", TRITON_INTERPRET="0")
    assert done.returncode == 2
    assert "argument --dry-run: needs TRITON_INTERPRET=1 in the environment" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is made for Linux on x86-64")
def test_dry_run_writes_one_file_and_one_chart(tmp_path):
    done = run("--dry-run", "--rounds", "1", "--out", str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-dry-run.json", "gpu-dry-run.png"]
    results = json.loads((tmp_path / "gpu-dry-run.json").read_text())["results"]
    assert len(results) == 8  # two shapes, two precisions, two modes
    assert all(row["seconds"]["fastlstm"] > 0 for row in results)
