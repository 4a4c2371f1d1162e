"""What setup.py makes of the version, the README and the compilers that it finds."""

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastlstm
from tests.helpers import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="runs setup.py, which needs setuptools"
)


def setup(*arguments, cwd=ROOT, **variables):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
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


def copied(folder):
    """Copy what setup.py reads, without csrc/."""
    for name in ("setup.py", "pyproject.toml", "README.md", "fastlstm/version.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


def test_the_pictures_of_an_index_page_are_files_and_not_pages_about_them(tmp_path):
    copied(tmp_path)
    picture = '<source srcset="e.svg"><img src="f.svg">'
    text = f"![A](a.png) [B](b.md) [![C](c.png)](c.md) {picture} ![D](https://d.org/d.png)"
    (tmp_path / "README.md").write_text(text)
    done = setup("--long-description", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    links = re.findall(r'(?:\]\(|src=|srcset=)"?([^)"]+)', done.stdout)
    address, version = links[0].split("/raw/")[0], f"v{fastlstm.__version__}"
    parts = [("raw", "a.png"), ("blob", "b.md"), ("raw", "c.png"), ("blob", "c.md"), ("raw", "e.svg"), ("raw", "f.svg")]
    assert links == [*(f"{address}/{kind}/{version}/{name}" for kind, name in parts), "https://d.org/d.png"]


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
def test_a_library_that_is_left_out_in_place_is_removed(tmp_path):
    copied(tmp_path)
    (tmp_path / "fastlstm/_native.so").touch()
    done = setup("build_ext", "--inplace", cwd=tmp_path, FASTLSTM_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "fastlstm/_native.so").exists()


WRITES_ITS_OUTPUT = """\
#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo compiled > "$2"; fi
    shift
done
"""


def compiler(path):
    """Make a compiler that writes a word for its output, and return its path.

    On macOS the tag of a wheel is read out of the first bytes of its libraries, so that these cannot be empty.
    """
    path.parent.mkdir(exist_ok=True)
    path.write_text(WRITES_ITS_OUTPUT)
    path.chmod(0o755)
    return str(path)


@posix
def test_clang_alone_is_enough(tmp_path, monkeypatch):
    for variable in ("CC", "CXX", "LDSHARED", "LDCXXSHARED"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("clang", "clang++"):
        compiler(tmp_path / "bin" / name)
    done, found = built(tmp_path, PATH=str(tmp_path / "bin"), FASTLSTM_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert found == ["_native.so"]


@posix
@pytest.mark.skipif(shutil.which("false") is None, reason="needs a command that fails")
def test_a_compiler_that_fails_is_an_error_with_a_way_out(tmp_path):
    done, found = built(tmp_path, CC="false", CXX="false")
    assert done.returncode != 0
    assert "the compiler failed on csrc/" in done.stderr
    assert "FASTLSTM_NATIVE=0" in done.stderr
    assert found == []


@posix
def test_a_missing_compiler_is_an_error_where_the_library_is_demanded(tmp_path):
    done, found = built(tmp_path, FASTLSTM_NATIVE="1", CC="no-such-cc", CXX="no-such-c++")
    assert done.returncode != 0
    assert "FASTLSTM_NATIVE=1 is set" in done.stderr
    assert "no compiler no-such-c++ and no no-such-cc is installed; CC and CXX in the environment name" in done.stderr
    assert found == []


def wheel(folder, **variables):
    """Return the name of the wheel that is built in a folder, and the libraries in it."""
    shutil.rmtree(folder / "dist", ignore_errors=True)
    commands = [
        *("egg_info", "--egg-base", folder),
        *("build", "--build-base", folder / "build"),
        *("bdist_wheel", "--dist-dir", folder / "dist", "--bdist-dir", folder / "bdist", "--compression", "stored"),
    ]
    done = setup(*commands, **variables)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        return path.name, [name for name in archive.namelist() if name.startswith("fastlstm/_native")]


@posix
def test_a_wheel_is_of_this_platform_if_it_holds_the_library(tmp_path):
    path = compiler(tmp_path / "compiler")
    name, libraries = wheel(tmp_path, CC=path, CXX=path, FASTLSTM_NATIVE="1")
    start = f"fastlstm-{fastlstm.__version__}-py3-none-"
    assert name.startswith(start)
    assert not name.endswith("-any.whl")
    assert libraries == ["fastlstm/_native.so"]
    name, libraries = wheel(tmp_path, FASTLSTM_NATIVE="0")  # in the same folder
    assert name == f"{start}any.whl"
    assert libraries == []


@pytest.mark.parametrize(
    ("variables", "licence", "licences"),
    [
        ({}, "MIT AND CC-BY-SA-3.0", ["LICENSE", "fastlstm/mnist/README.md"]),
        ({"FASTLSTM_MNIST": "0"}, "MIT", ["LICENSE"]),
    ],
    ids=["of a clone", "of a release"],
)
def test_what_a_wheel_holds_has_the_licence_that_it_names(tmp_path, variables, licence, licences):
    name, _ = wheel(tmp_path, FASTLSTM_NATIVE="0", **variables)
    with zipfile.ZipFile(tmp_path / "dist" / name) as archive:
        files = archive.namelist()
        (path,) = (path for path in files if path.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    images = {path.name for path in (ROOT / "fastlstm" / "mnist").glob("*.gz")}
    assert len(images) == 4
    assert images & {Path(path).name for path in files} == (set() if variables else images)
    assert metadata["License-Expression"] == licence
    assert [path.partition("/licenses/")[2] for path in files if "/licenses/" in path] == licences
    assert metadata.get_all("License-File") == licences
