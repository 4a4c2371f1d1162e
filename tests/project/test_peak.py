"""The yardstick: a limit that counts work which the machine never does makes everything look slower than it is."""

import re
import shutil
import subprocess

import pytest

from benchmarks.cpu import peak


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_no_sum_is_folded_away():
    """A chain that starts at its fixed point is a constant to the compiler: its operations counted, and never ran."""
    done = subprocess.run([*peak.command(4, "-S"), "-o", "-"], input=peak.SOURCE, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    blocks = re.split(r"^\.?\w+:", done.stdout, flags=re.MULTILINE)
    products = max(len(re.findall(r"^\s+v?f?(?:n?madd|mla|mul)[\w.]*\s", block, re.MULTILINE)) for block in blocks)
    assert products >= peak.SUMS
    assert products % peak.SUMS == 0  # the compiler may unroll further
