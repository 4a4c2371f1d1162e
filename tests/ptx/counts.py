"""What a time step costs: instructions that warps execute, sectors of global memory, bank conflicts.

    TRITON_INTERPRET=0 python -m tests.ptx.counts [CHIP ...]

prints a table of the kernels that save, for 8 batch rows, a single program where the kernel is resident. A row is the
difference between layers of 5 and of 2 steps, over 3. Instructions are those of all warps. Chips are 80 and 90.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator

import torch

from tests.ptx.layers import Case, run

CLASSES = (
    "mma", "special", "float", "convert", "integer", "mov", "ld.shared", "st.shared", "ld.global", "st.global",
    "cp.async", "shfl", "barrier", "async", "branch",
)  # fmt: skip
TRAFFIC = ("ld.global sectors", "st.global sectors", "ld.shared conflicts", "st.shared conflicts")
LAYERS = [
    (kind, H, I)
    for kind in ("bf16", "fp16", "tf32", "ieee")
    for H in ((32, 64, 128) if kind != "ieee" else (32, 64))
    for I in ((40, 28) if kind == "bf16" else (40,))
] + [("bf16", 256, 40), ("ieee", 256, 40)]


def per_step(chip: int, kind: str, H: int, I: int = 40, mask: str = "") -> Iterator[tuple[str, int, Counter[str]]]:
    """Of forward, which saves, and of backward: the kernel, its warps, and its counts of one step."""
    totals: list[dict[str, tuple[int, Counter[str]]]] = []
    for T in (2, 5):
        found: dict[str, tuple[int, Counter[str]]] = {}
        for launched in run(Case(chip, kind, H, mask, T=T, rows=8, I=I)).device.launches:
            _, counts = found.get(launched.kernel, (0, Counter()))
            found[launched.kernel] = launched.warps, counts + launched.counts
        totals.append(found)
    short, long = totals
    for name in ("forward_kernel", "backward_kernel"):
        warps, counts = short[name]
        yield name, warps, Counter({key: (long[name][1][key] - counts[key]) / 3 for key in long[name][1]})  # type: ignore[misc]


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    columns = [*CLASSES, *TRAFFIC]
    print("| chip | kernel | warps | instructions |", " | ".join(columns), "|")
    print("|---|---|" + "---:|" * (len(columns) + 2))
    for chip in map(int, sys.argv[1:] or ("80", "90")):
        for kind, H, I in LAYERS:
            for name, warps, counts in per_step(chip, kind, H, I):
                if name == "forward_kernel" or I > 32:  # the input's product is forward's alone
                    label = f"{name.split('_')[0]} {kind} H {H}" + f", I {I} fused" * (I <= 32)
                    numbers = " | ".join(f"{counts[column]:.4g}" for column in columns)
                    total = sum(counts[column] for column in CLASSES)
                    print(f"| sm_{chip} | {label} | {warps} | {total:.5g} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
