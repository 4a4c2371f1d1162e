"""The largest errors of the matrix of tests/ptx/test_layers.py, by chip and precision.

TRITON_INTERPRET=0 python -m tests.ptx.errors [CHIP ...]
"""

import sys
import time
import warnings

import torch

from tests.ptx.layers import BOUNDS, DTYPES, matrix, run


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    print("| chip | precision | layers | outputs | bound | gradients | bound | seconds of CPU |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for chip in map(int, sys.argv[1:] or ("80", "90")):
        for kind in DTYPES:
            start, cases = time.process_time(), [case for case in matrix() if (case.chip, case.kind) == (chip, kind)]
            results = [run(case) for case in cases]
            for case, result in zip(cases, results):
                if faults := result.faults(kind):
                    print(f"{case}: {faults} {result.errors} {result.device.findings}")
            outputs, gradients = max(r.outputs for r in results), max(r.gradients for r in results)
            numbers = f"{outputs:.1e} | {BOUNDS[kind][0]:.0e} | {gradients:.1e} | {BOUNDS[kind][1]:.0e}"
            seconds = time.process_time() - start
            print(f"| sm_{chip} | {kind} | {len(cases)} | {numbers} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
