"""The rate of fused multiply-adds this machine reaches in float32, the ceiling of every kernel on the CPU.

    python -m benchmarks.cpu.peak

Each thread keeps independent sums in vector registers and does nothing else; it releases the GIL, so that Python
threads run side by side. Clocks drift on shared and on thermally limited machines: measure it next to what it judges.
Needs a C compiler, GCC or Clang.
"""

import ctypes
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.shared import machine
from benchmarks.shared.clock import seconds_of

SUMS, ROUNDS = 12, 1_000_000  # a latency of 4 cycles on two units wants 8 sums, and AVX2 has 16 registers
SOURCE = """
typedef float vector __attribute__((vector_size(BYTES)));

float spin(long rounds) {
    vector sums[SUMS], total = {};
    for (int n = 0; n < SUMS; n++) sums[n] = (vector){} + (1 + (n + 1) / 64.0f);  // 1 would stay 1, a constant
    while (rounds--)
        for (int n = 0; n < SUMS; n++) sums[n] = sums[n] * 0.75f + 0.25f;
    for (int n = 0; n < SUMS; n++) total += sums[n];
    return total[0];
}
"""


def command(lanes: int, kind: str) -> list[str]:
    """Return how the source on standard input is compiled: kind "-shared" for a library, "-S" for assembly."""
    sizes = [f"-DBYTES={4 * lanes}", f"-DSUMS={SUMS}"]
    compiler = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-ffp-contract=fast", "-funroll-loops"]
    return [
        *compiler,
        "-fPIC",
        "-mprefer-vector-width=512" if lanes == 16 else "-fno-math-errno",
        *sizes,
        kind,
        "-xc",
        "-",
    ]


def main() -> None:
    lanes = machine.describe(1)["float32_lanes"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "peak.so"
        subprocess.run([*command(lanes, "-shared"), "-o", path], input=SOURCE, text=True, check=True)
        spin = ctypes.CDLL(str(path)).spin
    print(f"{machine.header()}; {lanes} lanes, {SUMS} sums")
    for threads in range(1, (os.cpu_count() or 1) + 1):
        with ThreadPoolExecutor(threads) as pool:
            run = lambda: list(pool.map(spin, [ROUNDS] * threads))  # noqa: B023, E731 # called in this turn
            least = min(seconds_of(run, 1) for _ in range(20))
        print(f"{threads} threads: {2 * lanes * SUMS * ROUNDS * threads / least / 1e9:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
