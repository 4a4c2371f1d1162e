"""Kernels from which what orders accesses is taken out, one barrier, fence or wait at a time: is it noticed?

    TRITON_INTERPRET=0 python -m tests.ptx.mutants [CASE ...]

prints for each kernel how many of them are, and the lines that nobody misses.

Triton emits some twice in a row. Those are taken out together. A loop that copies ahead begins with a wait and a
barrier, and ends with the same two. Between them nothing is copied or written, so nobody misses the first. And where a
thread writes again what nobody has read, nothing needs the barrier between: see `idle`.
"""

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch

from fastlstm.backends.triton import tiles
from tests.ptx.emulator.findings import Fault
from tests.ptx.emulator.operands import Unsupported
from tests.ptx.layers import PRECISIONS, Case, Result, run

ORDERING = r"^\s*(bar\.sync|fence\.proxy|cp\.async\.wait_group|wgmma\.fence|wgmma\.wait_group)"
ACCESS = r"\s*(@!?%p\d+\s+)?(ld|st|cp|mma|wgmma|ldmatrix|stmatrix|shfl|bra|atom|red)\b"
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
    overwrites: bool = False

    @property
    def idle(self) -> bool:
        """Whether nothing needs the line. Either it opens the loop of a kernel that copies ahead, a stepwise one.
        Or each thread writes the same places before it and after, and nobody reads between.
        """
        precision = PRECISIONS[self.case.kind]
        stepwise = isinstance(tiles.choose(self.case.H, precision, divmod(self.case.chip, 10)), tiles.Stepwise)
        return self.overwrites or (self.opens_loop and stepwise)

    def noticed(self) -> set[str]:
        """The kinds of faults without these lines, and of notes that the kernel has not with them."""
        try:
            left_out = {self.kernel: self.lines}
            result = run(self.case, self.kernel.split("_")[0], left_out=left_out, stops=True)
            notes = set(result.device.findings.found) - set(unchanged(self.case).device.findings.found)
            return result.faults(self.case.kind) | {kind for kind, _ in notes}
        except (Fault, Unsupported) as error:  # what is unsupported is what right code does not do
            return {str(error)}


@cache
def unchanged(case: Case) -> Result:
    return run(case)


def mutants(case: Case) -> Iterator[Mutant]:
    for kernel, texts in unchanged(case).device.kernels.items():
        if kernel != "pack_kernel":
            yield from _of_kernel(case, kernel, texts[0].split("\n"))


def _of_kernel(case: Case, kernel: str, lines: Sequence[str]) -> Iterator[Mutant]:
    """Runs of one ordering line, with the accesses before and after."""
    runs: list[Mutant] = []
    accesses: list[list[str]] = [[]]  # before, between and after the runs
    label = False
    for n, line in enumerate(lines, 1):
        if found := re.match(ORDERING, line):
            if runs and runs[-1].text == found[1] and not accesses[-1]:
                runs[-1] = runs[-1]._replace(lines=(*runs[-1].lines, n))
            else:
                runs.append(Mutant(case, kernel, (n,), found[1], label))
                accesses.append([])
        elif re.match(r"\$L__BB", line):
            label = True
            accesses[-1].append(line)
        elif re.match(ACCESS, line):
            label = False
            accesses[-1].append(line)
    for n, mutant in enumerate(runs):
        before, after = map(_overwritten, accesses[n : n + 2])
        yield mutant._replace(overwrites=bool(before) and before == after)


def _overwritten(accesses: list[str]) -> set[str]:
    """The places that a thread writes, or nothing if it does anything else."""
    stores = [re.match(r"\s*st\.shared\S*\s+(\[[^]]*\])", line) for line in accesses]
    return {found[1] for found in stores} if all(stores) else set()


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in CASES:
        if sys.argv[1:] and not any(text in str(case) for text in sys.argv[1:]):
            continue
        results: dict[tuple[str, str], list[tuple[int, bool]]] = defaultdict(list)
        for mutant in mutants(case):
            seen = bool(mutant.noticed()) or mutant.idle
            results[mutant.kernel, mutant.text].append((mutant.lines[0], seen))
        for (kernel, text), tried in results.items():
            missed = [line for line, seen in tried if not seen]
            end = f", not at lines {missed}" if missed else ""
            print(f"{case} {kernel}: {len(tried) - len(missed)} of {len(tried)} {text}{end}", flush=True)


if __name__ == "__main__":
    main()
