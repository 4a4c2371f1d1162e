"""What the documentation prints is run, and its links lead somewhere."""

import importlib
import importlib.util
import os
import pkgutil
import re
from pathlib import Path

import pytest

import fastlstm
from fastlstm import cells, convert
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import TORCH
from tests.helpers.pages import PAGES, Block, anchors, blocks, documented, links, relative, rows, said, text_of

# torch 2.9's gap, which the page on limits names
BEFORE = "import torch\ntorch._dynamo.config.fake_tensor_cache_enabled = False\n" if TORCH < (2, 10) else ""
OF_ITS_OWN = {"docs/tutorial.md", "docs/integrations.md"}  # test_tutorial.py, and tests/integrations/test_page.py
COMPILED = {"docs/cells.md", "docs/export.md", "docs/quantize.md", "docs/transforms.md"}  # or with many kernels: slow
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
NEEDED = ("onnxscript", "onnxruntime")
OF_OTHERS = {"build", "cibuildwheel", "ziglang"}  # commands of packages that the tests do not need


def output_of(found: list[Block], folder: Path) -> str:
    """Run the blocks of Python in a process of their own."""
    code = BEFORE + "\n".join(block.text for block in found if block.language == "python")
    return interpreter.run(code, cwd=folder, environment={**os.environ, "PYTHONPATH": str(ROOT)}, check=True).stdout


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow) if page in COMPILED else page
        for page in sorted(set(WITH_PYTHON) - OF_ITS_OWN)
    ],
)
def test_the_code_of_a_page_runs(page, tmp_path):
    """Its blocks run in their order and share their names; what they print is what they say.

    The first line of a block may say otherwise: that it is a file, runs in another process, or is not run and why.
    """
    found = [block for block in blocks(page) if block.unrun is None]
    for package in NEEDED:
        if importlib.util.find_spec(package) is None and re.search(r"torch\.onnx|import onnx", text_of(page)):
            pytest.skip(f"the page needs the package {package}")
    for module in [block for block in found if block.file]:
        (tmp_path / module.file).write_text(module.text, encoding="utf-8")
    elsewhere = [block for block in found if block.elsewhere]
    here = [block for block in found if not block.elsewhere and not block.file]
    for each in (here, *[[block] for block in elsewhere]):
        assert output_of(each, tmp_path) == said(each)


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    """By the rules of GitHub. `make docs` checks them by those of the site."""
    for path, anchor in links(page):
        to = relative(page, path) if path else ROOT / page
        assert to.exists(), f"{page} links to {path}"
        if anchor and to.suffix == ".md":
            there = anchors(to.relative_to(ROOT).as_posix())
            # a member stands below its class, by the rules of mkdocs.yml
            assert {anchor, anchor.rpartition(".")[0]} & there, f"{page} links to {path}#{anchor}"


def test_the_tests_that_the_contract_names_exist():
    files = list((ROOT / "tests").rglob("test_*.py"))
    there = {path.stem for path in files}
    for path in files:
        there |= set(re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"\btest_\w+", text_of("docs/contract.md")))
    assert len(named) > 20
    assert named - there == set()


def shown(name: str) -> object:
    """The object whose docstring the reference shows. A module hides what has its name in the package."""
    parent, _, last = name.rpartition(".")
    inside = getattr(importlib.import_module(parent), "__path__", [])
    if any(module.name == last for module in pkgutil.iter_modules(inside)):
        return importlib.import_module(name)
    return pkgutil.resolve_name(f"{parent}:{last}")


def test_every_public_name_has_its_place_in_the_reference():
    names = [name for page in PAGES for name in documented(page)]
    assert len(set(names)) == len(names)
    there = [shown(name) for name in names]
    for module in (fastlstm, cells, convert):
        for name in set(module.__all__) - {"cells", "CELLS"}:  # these two are a page, and a sentence of it
            assert any(getattr(module, name) is each for each in there), f"{module.__name__}.{name}"


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
EXTRAS = set(re.findall(r"^(\w+) = \[$", text_of("pyproject.toml"), re.MULTILINE))


def code(page: str) -> str:
    """All that a page shows as code: fenced and indented blocks, and what is between backticks."""
    text = text_of(page)
    indented = re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    return "\n".join([*(block.text for block in blocks(page)), *indented, *re.findall(r"`([^`\n]+)`", text)])


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_exist(page):
    for target in re.findall(r"^make ([a-z][\w-]*)", code(page), re.MULTILINE):
        assert target in TARGETS, f"{page}: make {target}"
    for name in re.findall(r"python -m ([\w.]+)", code(page)):
        assert importlib.util.find_spec(name) or name in OF_OTHERS, f"{page}: python -m {name}"
    for extra in re.findall(r"pip install '?(?:\.|fastlstm)\[(\w+)\]", code(page)):
        assert extra in EXTRAS, f"{page}: the extra {extra}"


def test_the_reference_has_all_cells_of_the_library():
    found = rows("docs/api/cells.md", "| cell | what it is |")
    assert [row[0] for row in found] == [f"`{cell.name}`" for cell in cells.CELLS]


def test_the_first_page_is_short_and_all_pages_together_can_be_read():
    first = text_of("README.md")
    assert len(first.splitlines()) <= 80
    assert len(first.split()) <= 650
    pages = ["README.md", *(page for page in PAGES if Path(page).parent == Path("docs"))]
    words = re.compile(r"[^\s|]*\w[^\s|]*")  # neither the bars of tables nor signs by themselves
    assert sum(len(words.findall(text_of(page))) for page in pages) <= 30_000
