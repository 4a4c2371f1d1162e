"""The minimum cut beside every choice there is."""

import contextlib
from itertools import combinations
from unittest import mock

import pytest

from fastlstm.cells import saving


def cost_of(some, nodes, needed, load, compute):
    """What it costs to have `needed` where `some` are loaded and all else is computed."""
    total, there, todo = sum(load[n] for n in some), set(some), list(needed)
    while todo:
        node = todo.pop()
        if node not in there:
            there.add(node)
            total += compute[node]
            todo += [a for a in node.args if not a.is_constant()]
    return total


@contextlib.contextmanager
def brute_force(largest):
    """Compare each cut of at most `largest` values with all choices. Yields the numbers of values compared."""
    cut, compared = saving.cut, []

    def checked(nodes, needed, load, compute):
        cost, loaded = cut(nodes, needed, load, compute)
        assert cost == pytest.approx(cost_of(loaded, nodes, needed, load, compute), rel=1e-12)
        if len(nodes) <= largest:
            choices = (some for count in range(len(nodes) + 1) for some in combinations(nodes, count))
            best = min(cost_of(some, nodes, needed, load, compute) for some in choices)
            assert cost == pytest.approx(best, rel=1e-12)
            compared.append(len(nodes))
        return cost, loaded

    with mock.patch.object(saving, "cut", checked):
        yield compared
