"""The demonstration without the extra `plots`: it trains, reads IDX files, and says in one line what it leaves out."""

import os
import textwrap

import pytest

from tests.helpers import ROOT, interpreter
from tests.helpers.demo import PNG, SMALL

HIDDEN = """
    import sys
    sys.modules["matplotlib"] = sys.modules["PIL"] = None  # importing them fails
    from fastlstm import {command}
    sys.exit({command}.main(sys.argv[1:]))
"""
LEFT_OUT = "the pictures are left out: drawing needs the package matplotlib; pip install 'fastlstm[plots]'"


def without_plots(command, *arguments):
    code = textwrap.dedent(HIDDEN).format(command=command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return interpreter.run(code, *arguments, cwd=ROOT, environment=environment)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run's directory, and what the trainer printed."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = without_plots("train", "--data", tiny, *SMALL, "--iterations=2", "--out", out)
    assert (done.returncode, done.stderr.count("Error")) == (0, 0), done.stderr
    return out, done.stdout


def test_it_trains_and_says_what_it_leaves_out(run):
    out, told = run
    assert told.endswith(f"\nmetrics.json and model.pt are in {out}\n{LEFT_OUT}\n")
    assert {"metrics.json", "model.pt"} <= {path.name for path in out.iterdir()}
    assert not list(out.glob("*.png"))


def test_it_reads_idx_files(run, tiny):
    done = without_plots("predict", tiny, "--model", run[0])
    assert done.returncode == 0, done.stderr
    assert " read rightly " in done.stdout


def test_it_draws_no_reading(run, tiny, tmp_path):
    done = without_plots("predict", tiny, "--model", run[0], "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    message = "argument --out: needs the package matplotlib; pip install 'fastlstm[plots]'"
    assert done.stderr == f"python -m fastlstm.predict: error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_picture_asks_for_pillow(run, tmp_path):
    path = tmp_path / "digit.png"
    path.write_bytes(PNG)
    done = without_plots("predict", path, "--model", run[0])
    assert (done.returncode, done.stdout) == (2, "")
    needed = "pictures need the package pillow; pip install 'fastlstm[plots]'"
    message = f"argument IMAGE: {path}: expected an IDX file, found another ({needed})"
    assert done.stderr == f"python -m fastlstm.predict: error: {message}\n"
