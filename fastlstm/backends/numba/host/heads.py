"""Which part of h a panel of units sees, where a layer has heads of D units each."""

from itertools import pairwise


def span_of(H: int, heads: int, lanes: int) -> int:
    """Columns of h that a panel multiplies at most: those of all heads that it has units of."""
    D = H // heads
    return max((min(k + lanes, H) - 1) // D - k // D + 1 for k in range(0, H, lanes)) * D


def reach_of(H: int, heads: int, lanes: int) -> int:
    """Panels that a group of panels, as columns of h, is multiplied for at most: those of all heads that it has units
    of.
    """
    D, panels = H // heads, -(-H // lanes)
    groups = -(-panels // 4)
    ends = [-(-panels * q // groups) * lanes for q in range(groups)] + [H]  # as `kernels.layout.group` has them
    return max(-(-((b - 1) // D + 1) * D // lanes) - a // D * D // lanes for a, b in pairwise(ends))
