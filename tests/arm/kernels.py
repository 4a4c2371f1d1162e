"""Compiles the kernels of `random_layers` for an emulated processor: under emulation each would take a minute.

python -m tests.arm.kernels TRIPLE NAME FEATURES

The three are what LLVM says of the emulated processor. Its processes find the kernels if the tree, NUMBA_CACHE_DIR and
the versions of numba and llvmlite are theirs. Else they compile kernels themselves.
"""

import os
import sys

TRIPLE, *MACHINE = sys.argv[1:]
os.environ["NUMBA_CPU_NAME"], os.environ["NUMBA_CPU_FEATURES"] = MACHINE  # which numba reads once

import llvmlite.binding as llvm  # noqa: E402

llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
for _module in llvm, llvm.targets:  # what numba compiles for
    _module.get_process_triple = _module.get_default_triple = lambda: TRIPLE

from fastlstm.backends.numba.host import tasks  # noqa: E402
from fastlstm.backends.numba.llvm.primitives import RARE  # noqa: E402
from tests.arm.random_layers import KINDS  # noqa: E402

SIZES = 4, 8  # bytes of an element


def main() -> None:
    kinds = ("primitives", *(f"{kind}." for kind in RARE))
    tasks.prepare([f"{kind}{size}" for kind in kinds for size in SIZES])
    tasks.prepare([tasks.table_of(kind, size) for kind in KINDS for size in SIZES])
    tasks.prepare([name for name in tasks.KERNELS if "_matrix" not in name])


if __name__ == "__main__":
    main()
