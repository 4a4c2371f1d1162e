"""What a result must say about where it came from."""

import multiprocessing
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastlstm

PACKAGES = ("fastlstm", "torch", "numba", "llvmlite", "numpy", "onnxruntime", "openvino", "triton")
ROOT = Path(__file__).parents[2]
STAT = Path("/proc/stat")  # of Linux: what all processes used
BUSY = 0.2  # processors: where others use more, times say nothing


def cpu_name() -> str:
    """Return the processor's name, with LLVM's word for its generation, which a virtual machine may hide. Intel's has
    none: LLVM guesses the generation of a processor that it does not know, and guesses wrong.
    """
    from llvmlite import binding  # not above: a GPU's times need none

    name = str(fastlstm.info()["processor"]["name"])
    return name if name.startswith("Intel") else f"{name} ({binding.get_host_cpu_name()})"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return those of the packages that are installed, and Python's."""
    installed = {name: metadata.version(name) for name in names if any(metadata.distributions(name=name))}
    return {"python": platform.python_version(), **installed}


def load() -> float | None:
    """Processes running or waiting, over the last minute; near 0 on a machine that is fit for measuring."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


class Others:
    """The work of other processes since this was made."""

    def __init__(self) -> None:
        self.began, self.before = time.perf_counter(), self._seconds()

    def processors(self) -> float:
        """Return how many processors others kept busy on average; 0 where the system does not say."""
        return (self._seconds() - self.before) / (time.perf_counter() - self.began)

    @staticmethod
    def _seconds() -> float:
        if not os.access(STAT, os.R_OK):
            return 0.0
        user, nice, system, _, _, *interrupts = map(int, STAT.read_text().split()[1:9])
        ticks = user + nice + system + sum(interrupts)
        for child in multiprocessing.active_children():  # of other runtimes, which run for this process
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks -= sum(map(int, fields[11:13]))  # of the user and of the system
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def versions_of(modules: Sequence[str]) -> dict[str, str]:
    """Return the versions of what installs these modules, by the names of modules."""
    owners = metadata.packages_distributions()
    return {name: metadata.version(owners[name][0]) for name in modules if name in owners}


def commit() -> str:
    """Return the last commit that changed what is measured, with "+" after a change since; without git the version."""
    measured = ["fastlstm", "csrc"]

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *measured]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("log", "-1", "--format=%h", "--abbrev=8") + "+" * bool(git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return fastlstm.__version__


def describe() -> dict[str, Any]:
    from fastlstm.backends.numba.llvm.simd import VECTOR_BYTES  # not above: it imports numba

    return {
        "cpu": cpu_name(),
        "float32_lanes": VECTOR_BYTES // 4,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "versions": versions(),
        "backend": os.environ.get("FASTLSTM_BACKEND", "auto"),
    }


def header() -> str:
    """Return a line on this machine, for the head of what a command prints."""
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{cpu_name()}, {cores}; load average {load()}; {named}"
