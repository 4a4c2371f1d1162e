"""The yardstick: a limit that counts work which the machine never does makes everything look slower than it is."""

import re

from benchmarks.peak import ACCUMULATORS, UNROLL, spin


def test_no_accumulator_is_folded_away():
    """A chain that starts at its fixed point is a constant to the compiler: its operations counted, and never ran."""
    spin(1)
    (assembly,) = spin.inspect_asm().values()
    blocks = re.split(r"^\.?\w+:", assembly, flags=re.MULTILINE)
    products = max(len(re.findall(r"^\s+v?f?(?:n?madd|mla|mul)[\w.]*\s", block, re.MULTILINE)) for block in blocks)
    assert products >= ACCUMULATORS * UNROLL
    assert products % (ACCUMULATORS * UNROLL) == 0  # the compiler may unroll further
