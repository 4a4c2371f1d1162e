"""Kernels from which what orders accesses is taken out, one barrier, fence or wait at a time: is it noticed?

    TRITON_INTERPRET=0 python -m tests.ptx.mutants [CASE ...]

prints for each kernel how many of them are, how many nothing needs, and the lines of others that nobody misses.

Triton emits some twice in a row, or at the end of a loop and after it. Those are taken out together. Nothing needs some
others: see `idle`.
"""

import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import chain, takewhile
from typing import NamedTuple

import torch

from fastlstm.backends.triton import tiles
from tests.ptx.emulator.findings import Fault
from tests.ptx.emulator.operands import Unsupported
from tests.ptx.layers import PRECISIONS, Case, Result, run

ORDERING = r"^\s*(bar\.sync|fence\.proxy|cp\.async\.wait_group|wgmma\.fence|wgmma\.wait_group)"
ACCESS = r"\s*(@!?%p\d+\s+)?(ld|st|cp|mma|wgmma\.mma_async|ldmatrix|stmatrix|bra)\b"
NOTHING = r"(\s*@!?%p\d+\s+bra\b[^;]*;\s*\$L__BB\d+_\d+:[^;]*)?"  # or the end of a loop
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
    between_products: bool = False

    @property
    def idle(self) -> bool:
        """Whether nothing needs the line. There are three kinds.

        * It opens the loop of a kernel that copies ahead, a stepwise one. Such a loop begins with a wait and a barrier,
          and ends with the same two, between which nothing is copied or written.
        * Each thread writes places after it that no other thread has touched before it.
        * It lies between two wgmma, and nothing is written between. Barriers and fences order no reads. Waits and
          wgmma.fence are for registers, and products that follow each other in one accumulator need neither.
        """
        precision = PRECISIONS[self.case.kind]
        stepwise = isinstance(tiles.choose(self.case.H, precision, divmod(self.case.chip, 10)), tiles.Stepwise)
        return self.overwrites or self.between_products or (self.opens_loop and stepwise)

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
            if runs and runs[-1].text == found[1] and re.fullmatch(NOTHING, "".join(accesses[-1])):
                runs[-1] = runs[-1]._replace(lines=(*runs[-1].lines, n))
                accesses[-1].clear()
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
        before, after = accesses[n : n + 2]
        overwrites = bool(before) and _places(before, "st|ld") == _places(after, "st") != set()
        earlier, later = [*chain(*accesses[: n + 1])], chain(*accesses[n + 1 :])
        products = set(map(_accumulator, takewhile(_accumulator, reversed(earlier))))
        following = _accumulator(next(later, ""))
        of_memory = mutant.text in ("bar.sync", "fence.proxy")
        one = bool(products and following and (of_memory or following in products))
        yield mutant._replace(overwrites=overwrites, between_products=one)


def _accumulator(access: str) -> str:
    """Of a product by wgmma its registers, and of anything else nothing."""
    found = re.match(r"\s*wgmma\.mma_async\S*\s+(\{[^}]*\})", access)
    return found[1] if found else ""


def _places(accesses: list[str], kinds: str) -> set[str]:
    """The places in shared memory that a thread accesses, or nothing if it does anything but these kinds."""
    found = [re.match(rf"\s*(?:{kinds})\.shared\S*\s.*(\[[^]]*\])", line) for line in accesses]
    return {match[1] for match in found} if all(found) else set()


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for case in CASES:
        if sys.argv[1:] and not any(text in str(case) for text in sys.argv[1:]):
            continue
        results: dict[tuple[str, str], list[Mutant]] = defaultdict(list)
        for mutant in mutants(case):
            results[mutant.kernel, mutant.text].append(mutant)
        for (kernel, text), tried in results.items():
            unnoticed = [mutant for mutant in tried if not mutant.noticed()]
            idle, missed = ([m.lines[0] for m in unnoticed if m.idle is one] for one in (True, False))
            ends = f", {len(idle)} that nothing needs" * bool(idle), f", not at lines {missed}" * bool(missed)
            print(f"{case} {kernel}: {len(tried) - len(unnoticed)} of {len(tried)} {text}{''.join(ends)}", flush=True)


if __name__ == "__main__":
    main()
