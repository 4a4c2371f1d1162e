"""Kernels from which what orders accesses is taken out, one barrier, fence or wait at a time: is it noticed?

    TRITON_INTERPRET=0 python -m tests.ptx.mutants [CASE ...]

prints for each kernel how many of them are, and the lines that nobody misses.

Triton emits some twice in a row. Those are taken out together. The loop of a stepwise kernel also begins with a wait and
a barrier right after the wait and the barrier that end it, or precede it. Nobody misses these, see `Mutant.opens_loop`.
"""

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from tests.ptx.emulator.findings import Fault
from tests.ptx.emulator.operands import Unsupported
from tests.ptx.layers import Case, run

ORDERING = r"^\s*(bar\.sync|fence\.proxy|cp\.async\.wait_group|wgmma\.fence|wgmma\.wait_group)"
CASES = [
    Case(chip, kind, H, mask, T=T, I=I, rows=rows, grads="cells" if mask else "all")
    for chip in (80, 90)
    for kind, H, mask, T, I, rows in (
        ("bf16", 64, "", 2, 28, 11), ("fp16", 33, "lengths", 2, 40, 11), ("tf32", 128, "", 2, 40, 11),
        ("ieee", 64, "reset", 2, 40, 11), ("bf16", 130, "lengths+reset", 1, 40, 3), ("ieee", 70, "lengths", 1, 40, 3),
    )
]  # fmt: skip


class Mutant(NamedTuple):
    """A line, or the same line several times in a row, of "forward_kernel" or "backward_kernel" of a case."""

    case: Case
    kernel: str
    lines: tuple[int, ...]
    text: str
    opens_loop: bool

    def noticed(self) -> set[str]:
        """The kinds of faults without these lines."""
        try:
            changed = without(self.kernel, self.lines)
            return run(self.case, self.kernel.split("_")[0], change=changed, stops=True).faults(self.case.kind)
        except (Fault, Unsupported) as error:  # what is unsupported is what right code does not do
            return {str(error)}


def without(kernel: str, lines: Sequence[int]) -> Callable[[str], str]:
    def change(ptx: str) -> str:
        if f".entry {kernel}(" not in ptx:
            return ptx
        return "\n".join("" if n in lines else line for n, line in enumerate(ptx.split("\n")))

    return change


def mutants(case: Case) -> Iterator[Mutant]:
    for kernel, texts in run(case).device.kernels.items():
        if kernel != "pack_kernel":
            yield from _of_kernel(case, kernel, texts[0].split("\n"))


def _of_kernel(case: Case, kernel: str, lines: Sequence[str]) -> Iterator[Mutant]:
    last, opens_loop = None, False
    for n, line in enumerate(lines):
        if found := re.match(ORDERING, line):
            if last and last.text == found[1]:
                last = last._replace(lines=(*last.lines, n))
                continue
            if last:
                yield last
            last = Mutant(case, kernel, (n,), found[1], opens_loop)
        elif re.match(r"\$L__BB", line):
            opens_loop = True
        elif re.match(r"\s*(@!?%p\d+\s+)?(ld|st|cp|mma|wgmma|ldmatrix|stmatrix|shfl|bra|atom|red)\b", line):
            if last:
                yield last
            last, opens_loop = None, False
    if last:
        yield last


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in CASES:
        if sys.argv[1:] and not any(text in str(case) for text in sys.argv[1:]):
            continue
        results: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
        for mutant in mutants(case):
            if not mutant.opens_loop:
                results[mutant.kernel, mutant.text].append((mutant.lines[0] + 1, bool(mutant.noticed())))
        for (kernel, text), tried in results.items():
            missed = [line for line, seen in tried if not seen]
            end = f", not at lines {missed}" if missed else ""
            print(f"{case} {kernel}: {len(tried) - len(missed)} of {len(tried)} {text}{end}", flush=True)


if __name__ == "__main__":
    main()
