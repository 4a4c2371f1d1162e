"""Kernels from which one line that orders accesses is taken out: is it noticed?

    TRITON_INTERPRET=0 python -m tests.ptx.mutants [CASE ...]

prints for each kernel how many of them are, and the lines that nobody misses.
"""

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from tests.ptx.layers import Case, run

ORDERING = r"^\s*(bar\.sync|fence\.proxy|cp\.async\.wait_group|wgmma\.fence|wgmma\.wait_group)"
CASES = [
    Case(chip, kind, H, mask, I=I, rows=rows, grads="cells" if mask else "all")
    for chip in (80, 90)
    for kind, H, mask, I, rows in (
        ("bf16", 64, "", 28, 11), ("fp16", 33, "lengths", 40, 11), ("tf32", 128, "", 40, 11),
        ("ieee", 64, "reset", 40, 11), ("bf16", 130, "lengths+reset", 40, 3), ("ieee", 130, "lengths", 40, 3),
    )
]  # fmt: skip


class Mutant(NamedTuple):
    """One line of a kernel: "forward_kernel" or "backward_kernel" of a case."""

    case: Case
    kernel: str
    line: int
    text: str

    def noticed(self) -> set[str]:
        """The kinds of faults without this line."""
        try:
            return run(self.case, self.kernel.split("_")[0], without(self.kernel, self.line)).faults(self.case.kind)
        except NotImplementedError as error:  # what only wrong code would make the emulator do
            return {str(error)}


def without(kernel: str, line: int) -> Callable[[str], str]:
    def change(ptx: str) -> str:
        if f".entry {kernel}(" not in ptx:
            return ptx
        lines = ptx.split("\n")
        lines[line] = ""
        return "\n".join(lines)

    return change


def mutants(case: Case) -> Iterator[Mutant]:
    for kernel, texts in run(case).device.kernels.items():
        if kernel != "pack_kernel":
            for n, line in enumerate(texts[0].split("\n")):
                if found := re.match(ORDERING, line):
                    yield Mutant(case, kernel, n, found[1])


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in CASES:
        if sys.argv[1:] and not any(text in str(case) for text in sys.argv[1:]):
            continue
        results: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
        for mutant in mutants(case):
            results[mutant.kernel, mutant.text].append((mutant.line + 1, bool(mutant.noticed())))
        for (kernel, text), tried in results.items():
            missed = [line for line, seen in tried if not seen]
            end = f", not at lines {missed}" if missed else ""
            print(f"{case} {kernel}: {len(tried) - len(missed)} of {len(tried)} {text}{end}", flush=True)


if __name__ == "__main__":
    main()
