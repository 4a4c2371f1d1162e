"""The demonstration without the extra `plots`: it trains, reads IDX files, and says in one line what it leaves out."""

import os
import textwrap

from tests.helpers import ROOT, interpreter
from tests.helpers.demo import PNG, SMALL

HIDDEN = """
    import sys
    sys.modules["matplotlib"] = sys.modules["PIL"] = sys.modules["tqdm"] = None  # importing them fails
    from fastlstm import {command}
    sys.exit({command}.main(sys.argv[1:]))
"""
EXTRA = "fastlstm[plots]"


def without_plots(command, *arguments):
    code = textwrap.dedent(HIDDEN).format(command=command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return interpreter.run(code, *arguments, cwd=ROOT, environment=environment)


def test_it_trains_and_reads_idx_files_and_says_what_it_leaves_out(tiny, tmp_path):
    out, read, picture = tmp_path / "run", tmp_path / "read", tmp_path / "digit.png"
    trained = without_plots("train", "--data", tiny, *SMALL, "--iterations=2", "--out", out)
    assert trained.returncode == 0, trained.stderr
    assert EXTRA in trained.stdout
    assert {path.name for path in out.iterdir()} == {"checkpoint.pt", "metrics.json", "model.pt"}

    done = without_plots("predict", tiny, "--model", out)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 131

    picture.write_bytes(PNG)
    for argument, arguments in (("--out", (tiny, "--out", read)), ("IMAGE", (picture,))):
        done = without_plots("predict", *arguments, "--model", out)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert f"argument {argument}: " in done.stderr
        assert EXTRA in done.stderr
    assert not read.exists()
