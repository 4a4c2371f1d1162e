"""What the documentation prints is run."""

import os
import re

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
