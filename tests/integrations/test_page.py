"""The code of the page on integrations runs, each section with its library, and prints what it says."""

import importlib.util
import os
import re

import pytest

from tests.helpers import ROOT, interpreter
from tests.helpers.pages import FENCE, Block, said, text_of

_, *SECTIONS = re.split(r"^## (?=.*\n)", text_of("docs/integrations.md"), flags=re.MULTILINE)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.partition("\n")[0])
def test_a_section_runs(section, tmp_path):
    blocks = [Block(*each) for each in FENCE.findall(section)]
    code = "\n".join(block.text for block in blocks if block.language == "python" and block.unrun is None)
    for package in sorted(set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the section needs the package {package}: pip install .[integrations]")
        if package == "torchrl" and importlib.util.find_spec("benchmarl"):
            pytest.skip("the section needs torchrl 0.14, and BenchMARL an older one")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": "torch"}
    done = interpreter.run(code, cwd=tmp_path, environment=environment, check=True)
    assert done.stdout == said(blocks)
