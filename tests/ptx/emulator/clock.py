"""Where a CTA is in time: PTX ISA, "Memory Consistency Model"."""

from dataclasses import dataclass
from typing import Any

from tests.ptx.emulator.findings import Findings


@dataclass
class Clock:
    """A CTA's time in two units: epochs end at CTA-wide barriers, ticks also at warp-wide ones.

    Attributes:
        proxy_fences: how many fences between the generic and the async proxy there were.
        instruction: the one that runs, for findings.
    """

    findings: Findings
    cta: int
    epoch: int = 1
    tick: int = 1
    proxy_fences: int = 0
    instruction: Any = None

    def report(self, kind: str, detail: str) -> None:
        self.findings.report(kind, self.instruction, detail)

    def barrier(self) -> None:
        self.epoch += 1
        self.tick += 1
