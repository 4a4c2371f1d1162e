"""What the emulator notices: findings, of which some are no errors by themselves."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# A kernel with these is right as long as its numbers are.
NOTES = {
    "written twice": "Two threads write the same bits to one place in one instruction.",
    "same-warp": "Lanes of one warp follow each other at one place in program order, and nothing else orders them.",
    "zeros after fence": "An accumulator got zeros after wgmma.fence; ptxas gives the product its zero register.",
}


class Fault(RuntimeError):
    """The first error, where findings are to stop a launch."""


@dataclass
class Findings:
    """Each kind at each line of PTX, with the number of times and the first one's details. True if any is an error.

    Attributes:
        stops: raise `Fault` at the first error.
    """

    stops: bool = False
    found: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    kernel: str = ""

    def report(self, kind: str, instruction: Any, detail: str) -> None:
        place = f"{instruction.line}: {instruction.text} [{instruction.where}]" if instruction else "-"
        self.found.setdefault((kind, f"{self.kernel} {place}"), [0, detail])[0] += 1
        if self.stops and kind not in NOTES:
            raise Fault(str(self))

    @property
    def kinds(self) -> set[str]:
        """The kinds of errors."""
        return {kind for kind, _ in self.found} - set(NOTES)

    def lines(self, notes: bool = False) -> Iterator[str]:
        for (kind, place), (count, detail) in self.found.items():
            if notes or kind not in NOTES:
                yield f"{kind} ({count} times) at {place}: {detail}"

    def __bool__(self) -> bool:
        return bool(self.kinds)

    def __str__(self) -> str:
        return "\n".join(self.lines()) or "nothing found"

    __repr__ = __str__
