"""A launch: its CTAs one after the other, or interleaved at random."""

import random
from collections import Counter

import numpy as np

from tests.ptx.emulator.findings import Findings
from tests.ptx.emulator.global_memory import Global
from tests.ptx.emulator.machine import Chip, Launch, Machine
from tests.ptx.emulator.parse import Kernel
from tests.ptx.emulator.program import Operation

# What a tensor core adds at once is that of Fasi et al. for the A100. Later measurements give an H100 longer blocks and
# one bit more.
CHIPS = {
    80: Chip("sm_80", {"f16": 8, "bf16": 8, "tf32": 4}, 1),
    90: Chip("sm_90", {"f16": 16, "bf16": 16, "tf32": 8}, 2),
    100: Chip("sm_100", {"f16": 16, "bf16": 16, "tf32": 8}, 2),
}
PATIENCE = 5000  # turns of each CTA in which memory does not change, before the launch counts as hung


class Hang(RuntimeError):
    """CTAs wait for what no other CTA will do."""


def run(
    kernel: Kernel, code: list[Operation], shared_bytes: int, memory: Global, parameters: dict[str, int],
    grid: tuple[int, int, int], chip: int, findings: Findings, interleave: int | None = None,
) -> Launch:  # fmt: skip
    """Run all CTAs.

    interleave: the seed of the order in which they take turns, or None for one CTA after the other. A turn ends before
    each access to global memory.
    """
    counts: np.ndarray = np.zeros(len(code), np.int64)
    launch = Launch(
        kernel, code, shared_bytes, memory, parameters, grid, CHIPS[chip], findings, counts, Counter()
    )  # fmt: skip
    number, findings.kernel = grid[0] * grid[1] * grid[2], kernel.name
    with np.errstate(all="ignore"):
        if interleave is None:
            for cta in range(number):
                _take_turns([Machine(launch, cta)], random.Random(0), memory)
        else:
            _take_turns([Machine(launch, cta) for cta in range(number)], random.Random(interleave), memory)
    return launch


def _take_turns(machines: list[Machine], rng: random.Random, memory: Global) -> None:
    turns = [machine.steps() for machine in machines]
    changes, idle = memory.changes, 0
    while turns:
        chosen = turns[rng.randrange(len(turns))] if len(turns) > 1 else turns[0]
        try:
            next(chosen)
        except StopIteration:
            turns.remove(chosen)
            idle = 0
        if memory.changes != changes:
            changes, idle = memory.changes, 0
        idle += 1
        if idle > PATIENCE * len(turns) and turns:
            raise Hang(f"{len(turns)} of {len(machines)} CTAs at once go on without an end, and change nothing")
