"""What setup.py makes of the version, the README and the compilers that it finds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

import fastlstm
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="runs setup.py, which needs setuptools"
)


def setup(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, **variables},
    )


def test_the_version_stands_in_one_place():
    done = setup("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fastlstm.__version__


def test_the_links_of_an_index_page_are_absolute_and_lead_somewhere():
    done = setup("--long-description")
    assert done.returncode == 0, done.stderr
    links = re.findall(r"\]\(([^)]+)\)", done.stdout)
    assert len(links) > 10
    for link in links:
        assert re.match(r"https://|#", link)
        if inside := re.match(rf"https://[^#]*/blob/v{re.escape(fastlstm.__version__)}/([^#]*)", link):
            assert (ROOT / inside[1]).exists()


def built(folder, **variables):
    done = setup("build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp", **variables)
    return done, [path.name for path in folder.rglob("_native*")]


posix = pytest.mark.skipif(os.name == "nt", reason="csrc/ does not compile for Windows")


@posix
@pytest.mark.parametrize(
    "variables", [{"FASTLSTM_NATIVE": "0"}, {"CC": "no-such-cc", "CXX": "no-such-c++"}], ids=["unwanted", "missing"]
)
def test_without_a_compiler_there_is_no_library(tmp_path, variables):
    done, found = built(tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert found == []


@posix
@pytest.mark.skipif(shutil.which("false") is None, reason="needs a command that fails")
def test_a_compiler_that_fails_is_an_error_with_a_way_out(tmp_path):
    done, found = built(tmp_path, CC="false", CXX="false")
    assert done.returncode != 0
    assert "the compiler failed on csrc/" in done.stderr
    assert "FASTLSTM_NATIVE=0" in done.stderr
    assert found == []
