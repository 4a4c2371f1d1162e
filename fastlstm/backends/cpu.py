"""The processors and threads that a call on a CPU may use, and from which size on weights are large."""

import ctypes
import math
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Bytes of weights above which they and their packed form do not both stay in a second-level cache: a single step then
# packs in the call, see docs/design.md.
LARGE = 1 << 20
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the parent's threads do not exist here, and OpenMP would wait for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def time_quota(cgroups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """Return how many processors' time the control groups of this process allow, or infinity. `cgroups`: their folder,
    of version 1 or 2. `membership`: the file that says which of them this process is in.
    """
    quota = math.inf
    try:
        lines = membership.read_text().splitlines()
    except (OSError, ValueError):  # no Linux, or a file that nobody may read
        return quota
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers or "cpu" in controllers.split(","):
            folder = cgroups / "cpu" if controllers else cgroups
            for part in ("", *path.split("/")):  # a group has no more than those that it is in
                folder = folder / part
                quota = min(quota, _quota_of(folder))
    return quota


def _quota_of(folder: Path) -> float:
    try:
        if (limit := folder / "cpu.max").exists():
            time, period = limit.read_text().split()
        else:
            time, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(time) / int(period) if int(time) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or no limit, which version 2 calls "max"
        return math.inf


@cache
def _openmp_library() -> Any:
    """Return torch's library, by which its OpenMP (libgomp, or LLVM's libomp, on macOS, with the same functions) is
    reached, or None where that has none of the functions called here.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
    except OSError:
        return None
    return library if hasattr(library, "GOMP_parallel") and hasattr(library, "omp_get_num_procs") else None


def allowed_processors() -> int:
    """Return on how many processors the system may run this process."""
    library = _openmp_library()
    if library is not None:  # it knows the affinity at the start of the process: OMP_PROC_BIND narrows that of threads
        return int(library.omp_get_num_procs())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_processors(quota: float, allowed: int) -> tuple[int, str | None]:
    """Return how many processors this process may use, and why these are not all cores. A quota of 1.5 counts as 2: one
    thread would leave a third of it, and the system stops all threads together when they have used it up.
    """
    cores = os.cpu_count() or 1
    if quota < allowed:
        return math.ceil(quota), f"a quota of {quota:.3g}"
    return allowed, "affinity" if allowed < cores else None


# Read once, since reading takes longer than a short call
PROCESSORS, PROCESSORS_REASON = usable_processors(time_quota(), allowed_processors())


def threads_now() -> int:
    """Return how many threads a call may use: torch's number, one in a forked child, at most the usable processors."""
    asked = torch.get_num_threads()
    return 1 if _forked else asked if asked < PROCESSORS else PROCESSORS  # min() takes 0.1 us


@cache
def openmp() -> Any:
    """Return GOMP_parallel and the addresses of omp_get_thread_num and omp_get_num_threads, or None. They are of
    torch's OpenMP, since two pools of threads would fight for the cores.
    """
    library = _openmp_library()
    if library is None:
        return None
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library.GOMP_parallel, address_of(library.omp_get_thread_num), address_of(library.omp_get_num_threads)


def address_of(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0
