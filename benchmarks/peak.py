"""The rate of fused multiply-adds this machine reaches in float32, the ceiling that every CPU figure is held against.

    python -m benchmarks.peak

Each thread keeps independent accumulators in vector registers and does nothing else; it releases the GIL, so Python
threads run side by side. Clocks drift on shared and on thermally limited machines: measure it next to what it judges.
"""

import os
import platform
import threading
import time
from collections.abc import Iterator

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I64 = ir.FloatType(), ir.IntType(64)
UNROLL = 4  # rounds over the accumulators in one pass of the loop


def vector_shape() -> tuple[int, int, bool]:
    """(float32 lanes, accumulators, has FMA): latency 4 on two units wants 8 chains, the register file ends it."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 24, True
    if features.get("avx2") and features.get("fma"):
        return 8, 12, True
    if platform.machine().lower() in ("arm64", "aarch64"):
        return 4, 24, True
    return 4, 12, False  # without the instruction llvm.fma is a library call: a product and a sum then


LANES, ACCUMULATORS, HAS_FMA = vector_shape()


@intrinsic
def fma_rounds(typingctx, rounds):
    """acc = acc * a + b, `rounds` times over all accumulators; returns one number that depends on every one of them."""

    def codegen(context, builder, sig, args):
        vec = ir.VectorType(F32, LANES)
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vec, [vec] * 3), f"llvm.fma.v{LANES}f32")

        def step(value):
            return builder.call(fma, [value, a, b]) if HAS_FMA else builder.fadd(builder.fmul(value, a), b)

        a, b = (ir.Constant(vec, [float(np.float32(value))] * LANES) for value in (0.75, 0.25))  # stays near 1
        before, body, after = builder.block, builder.append_basic_block("round"), builder.append_basic_block("done")
        builder.branch(body)
        builder.position_at_end(body)
        count = builder.phi(I64)
        count.add_incoming(I64(0), before)
        acc = [builder.phi(vec) for _ in range(ACCUMULATORS)]
        for n, phi in enumerate(acc):  # different starts, or the chains would be one; 1 would stay 1, a constant
            phi.add_incoming(ir.Constant(vec, [float(np.float32(1 + (n + 1) / 64))] * LANES), before)
        new = list(acc)
        for _ in range(UNROLL):
            new = [step(value) for value in new]
        count_next = builder.add(count, I64(1))
        builder.cbranch(builder.icmp_signed("<", count_next, args[0]), body, after)
        count.add_incoming(count_next, body)
        for phi, value in zip(acc, new, strict=True):
            phi.add_incoming(value, body)
        builder.position_at_end(after)
        total = new[0]
        for value in new[1:]:
            total = builder.fadd(total, value)
        return builder.extract_element(total, ir.IntType(32)(0))

    return types.float32(types.int64), codegen


@njit(nogil=True)
def spin(rounds):
    return fma_rounds(rounds)


FLOPS_PER_ROUND = 2 * LANES * ACCUMULATORS * UNROLL


def seconds_of(rounds: int, threads: int) -> float:
    """Wall time of `rounds` on each of `threads` threads, from the first one's start to the last one's end."""
    barrier = threading.Barrier(threads)
    spans = []

    def work() -> None:
        barrier.wait()
        start = time.perf_counter()
        spin(rounds)
        spans.append((start, time.perf_counter()))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def rates(threads: int, runs: int, seconds: float) -> Iterator[float]:
    spin(1)  # compiled here, not inside the clock
    rounds = 1000
    while (elapsed := seconds_of(rounds, 1)) < 1e-3:
        rounds *= 2
    rounds = max(1, int(rounds * seconds / elapsed))
    for _ in range(runs):
        yield threads * rounds * FLOPS_PER_ROUND / seconds_of(rounds, threads) / 1e9


def fma_peak(threads: int = 1, runs: int = 20, seconds: float = 0.005) -> float:
    """GFLOP/s of float32 FMAs (two operations each) on `threads` threads: the best of several short runs."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return max(rates(threads, runs, seconds))


if __name__ == "__main__":
    print(f"{LANES} lanes, {ACCUMULATORS} accumulators")
    for threads in range(1, (os.cpu_count() or 1) + 1):
        print(f"{threads} thread{'s' if threads > 1 else ''}: {fma_peak(threads):.1f} GFLOP/s")
