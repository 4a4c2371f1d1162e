"""What the documentation prints is run."""

import importlib.util
import os
import re

import pytest
import torch

from fastlstm import cells
from tests.helpers import ROOT, interpreter
from tests.helpers.layers import TORCH

# torch 2.9's gap, which the page names
BEFORE = "import torch\ntorch._dynamo.config.fake_tensor_cache_enabled = False\n" if TORCH < (2, 10) else ""


def test_the_page_on_transforms_runs(tmp_path):
    """Its blocks in their order, the one for another process in another process; what they print is what they say."""
    text = (ROOT / "docs" / "transforms.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    loading = [number for number, block in enumerate(blocks) if "torch.export.load" in block]
    assert len(loading) == 1
    elsewhere = blocks.pop(loading[0])
    for code in (BEFORE + "\n".join(blocks), elsewhere):
        done = interpreter.run(code, cwd=tmp_path, environment={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert done.stdout == "torch.Size([35, 4, 128])\n"


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page in their order: (language, text)."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def said(found: list[tuple[str, str]]) -> str:
    """What the blocks say that they print: behind a call of print, or in a block of text."""
    lines = []
    for language, text in found:
        lines += re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE) if language == "python" else text.splitlines()
    return "".join(f"{line}\n" for line in lines)


def output_of(found: list[tuple[str, str]], folder) -> str:
    """Run the blocks of Python in a process of their own."""
    code = BEFORE + "\n".join(text for language, text in found if language == "python")
    done = interpreter.run(code, cwd=folder, environment={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_on_cells_runs(tmp_path):
    """Its first block is a module, and the one that loads runs in another process."""
    (_, module), *found = blocks("docs/cells.md")
    name = re.match(r"# (\w+\.py)\n", module)
    (tmp_path / name[1]).write_text(module, encoding="utf-8")
    elsewhere = next(block for block in found if "export.load(" in block[1])
    found.remove(elsewhere)
    assert output_of(found, tmp_path) == said(found)
    assert output_of([elsewhere], tmp_path) == said([elsewhere])


def test_the_page_on_the_gru_runs(tmp_path):
    found = blocks("docs/gru.md")
    assert output_of(found, tmp_path) == said(found)


def test_the_page_on_int8_runs(tmp_path):
    found = blocks("docs/quantize.md")
    assert output_of(found, tmp_path) == said(found)


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="it exports to ONNX, which needs onnxscript")
def test_the_readme_runs(tmp_path):
    assert "onnx" in output_of(blocks("README.md"), tmp_path)  # whose exporter tells what it does


def rows(page: str, head: str) -> list[list[str]]:
    """The cells of the table whose first line begins so."""
    table = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{head}")[2].partition("\n\n")[0]
    return [[each.strip() for each in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_what_the_page_on_cells_says_of_mistakes():
    mistakes = rows("docs/cells.md", "| written | the message says |")
    assert len(mistakes) > 10
    for written, message in mistakes:
        function = eval(f"lambda a, h: {written.strip('`')}", {"torch": torch, **vars(cells)})
        with pytest.raises(TypeError, match=re.escape(message.replace("\\`", "`"))):
            cells.cell(gates={"a": "xh"}, states=("h",))(function)


def test_what_the_page_on_cells_says_of_the_library():
    found = rows("docs/cells.md", "| cell | products of x and h |")
    assert [row[0] for row in found] == [f"`{cell.name}`" for cell in cells.CELLS]
    for cell, (_, both, of_x, of_h, states, saved, operations, _) in zip(cells.CELLS, found, strict=True):
        sums = {"xh": both.split(), "x": of_x.split(), "h": of_h.split()}
        assert cell.gates == {gate: of for of, gates in sums.items() for gate in gates}
        derived, layout = cell.derived(), cell.layout
        kept = f" ({' '.join(layout.sequences)})" if layout.sequences else ""
        assert (states, saved) == (" ".join(cell.states), (" ".join(layout.saved) or "nothing") + kept)
        assert operations == f"{derived.forward.count}, {derived.backward.count}"
