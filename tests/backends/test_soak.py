"""Many calls in one process: ``python -m tests.backends.test_soak SECONDS`` runs as long as it is told to.

Layers of every kind are called in every way, in random order and on random teams and threads. Each has the same bits
every time, and after the first sixth of the time memory, open files and threads grow no more.
"""

import gc
import os
import platform
import random
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from tests.helpers import ROOT, kinds
from tests.helpers.cases import Case
from tests.helpers.memory import resident
from tests.helpers.quantized import KERNELS
from tests.helpers.threads import SPLITS, split

MEMORY_BYTES = 32 << 20  # by which the allocator's pages may vary


def results_of_transforms(case):
    """Gradients of each row by itself. Forward mode runs too, in plain PyTorch, whose bits depend on threads."""
    module = replace(case).module
    weights, x = {name: a.detach() for name, a in module.named_parameters()}, case.values[0].nan_to_num()

    def call(weights, x):
        return functional_call(module, weights, x)[0]

    rows = vmap(grad(lambda *given: call(*given).square().sum()), (None, 1))(weights, x.unsqueeze(2))
    jvp(partial(call, weights), (x,), (torch.ones_like(x),))
    return [*rows.values()]


def draw_call():
    """A function that makes a layer and calls it, whose results are the same every time."""
    draw = random.choice
    sizes = draw([1, 2, 9, 28, 60]), draw([1, 3, 8, 33]), draw([1, 7, 40]), draw([3, 15, 48, 96, 159])
    way = draw(["layer", "layer", "layers", "transforms", "stream", "ensemble", *["int8"] * len(KERNELS)])
    name = draw(kinds.OF_NATIVE if way == "int8" else kinds.NAMES if way == "layer" else kinds.OF_X)
    backends = ["numba"] * (way != "int8") + KERNELS * (name in kinds.OF_NATIVE and way != "ensemble")
    options = {"layers": 2, "bidirectional": True} if way == "layers" else {}
    flags = {"zeros": draw([True, False]), "bias": draw([True, False]), "mask": draw(["", "lengths+reset"])}
    case = Case(name, sizes, **options, **flags, backend=draw(backends), seed=draw(range(99)))
    return {
        "layer": partial(kinds.results, case),
        "layers": partial(kinds.results, case),
        "transforms": partial(results_of_transforms, case),
        "stream": partial(kinds.results_of_stream, case),
        "ensemble": partial(kinds.results_of_ensemble, case, 3),
        "int8": partial(kinds.results_of_int8, case, draw(["int8", "int16"])),
    }[way]


def checksums(results):
    return [zlib.crc32(a.contiguous().numpy()) for a in results]


class Sample(NamedTuple):
    seconds: int
    calls: int
    memory: int
    files: int
    threads: int


def soak(seconds):
    """Call until the time is over, and return samples of what the process holds."""
    calls = [draw_call() for _ in range(max(20, seconds // 9))]
    want = [checksums(call()) for call in calls]
    samples, count, start = [], 0, time.monotonic()
    while (now := time.monotonic() - start) < seconds or len(samples) < 12:
        with split(*random.choice(SPLITS)):
            for number in random.choices(range(len(calls)), k=10):
                assert checksums(calls[number]()) == want[number], calls[number]
                count += 1
        if now > seconds / 60 * len(samples):
            with split(*SPLITS[-1]):  # as many threads as there are at most
                kinds.results_of_stream(Case("lstm", (2, 40, 7, 96), backend="numba"))
            gc.collect()
            open_files, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
            samples.append(Sample(int(now), count, resident(), open_files, threads))
            print(samples[-1], flush=True)
    return samples


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads from Linux's /proc what a process holds")
def test_a_process_does_not_grow():
    command = sys.executable, "-m", "tests.backends.test_soak", "60"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    print("seed", seed, flush=True)
    samples = soak(int(sys.argv[1]))
    first, rest = samples[: len(samples) // 6], samples[len(samples) // 6 :]
    for name, allowed in (("memory", MEMORY_BYTES), ("files", 0), ("threads", 0)):
        before, after = (max(getattr(sample, name) for sample in part) for part in (first, rest))
        print(f"{name}: {before} in the first sixth, {after} later", flush=True)
        assert after <= before + allowed, name
