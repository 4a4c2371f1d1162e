"""The tutorial runs, prints what it says, and reaches its accuracy."""

import importlib.util
import os
import re

import pytest

from tests.helpers import ROOT, interpreter, script
from tests.helpers.pages import blocks, said

WHOLE = "iterations = 800\n"


def printed(folder, iterations):
    """What the page prints if it trains for so many iterations; its own assertions run as well."""
    code = "".join(text for language, text in blocks("docs/tutorial.md") if language == "python")
    assert code.count(WHOLE) == 1
    code = code.replace(WHOLE, f"iterations = {iterations}\n")
    return interpreter.run(
        code, cwd=folder, environment={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=1200, check=True
    ).stdout


def shapes(text):
    """The lines with a mark in the place of each number: what is printed, whatever was learnt."""
    return [re.sub(r"\d+(\.\d+)?", "#", line) for line in text.splitlines()]


def accuracy(text):
    """On all test images, in percent."""
    return float(re.search(r"of the first 128 test images, ([\d.]+)% of all$", text, re.MULTILINE)[1])


def test_the_tutorial_runs(tmp_path):
    """With an eighth of its iterations."""
    found = printed(tmp_path, 100)
    assert set(shapes(found)) == set(shapes(said(blocks("docs/tutorial.md"))))
    assert accuracy(found) > 70  # five seeds had 81.9 to 84.3 after 100 iterations; a guess has 10


@pytest.mark.slow
def test_the_tutorial_reaches_its_accuracy(tmp_path):
    expected = said(blocks("docs/tutorial.md"))
    found = printed(tmp_path, 800)
    assert shapes(found) == shapes(expected)
    # Rounding makes each machine's run another draw. Five seeds had 95.4 to 96.8, 96.1 on average with a deviation of
    # 0.5: the bound is four of these below. After half of the iterations all seeds had at most 95.1.
    assert accuracy(found) > 94
    assert accuracy(expected) > 94


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="draws with matplotlib")
def test_the_pictures_of_the_tutorial(tmp_path):
    drawn = script("docs/tutorial/pictures.py").main(tmp_path, iterations=1)
    shown = re.findall(r"^!\[.+\]\((.*)\)$", (ROOT / "docs/tutorial.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [f"tutorial/{path.name}" for path in drawn] == shown
    for path, there in zip(drawn, shown, strict=True):
        assert path.read_bytes()[16:24] == (ROOT / "docs" / there).read_bytes()[16:24]  # width and height of a PNG
