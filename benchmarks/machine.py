"""What a result must say about where it came from."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("fastlstm", "torch", "numba", "llvmlite", "numpy", "onnxruntime", "openvino")


def cpu_name() -> str:
    """The processor's name, with LLVM's word for its generation, which a virtual machine may hide. Intel's has none:
    LLVM guesses the generation of a processor that it does not know, and guesses wrong.
    """
    from llvmlite import binding  # not above: a GPU's benchmark needs no numba

    name = _model_name()
    return name if name.startswith("Intel") else f"{name} ({binding.get_host_cpu_name()})"


def _model_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    if platform.system() == "Darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def load() -> float | None:
    """Processes running or waiting, over the last minute; near 0 on a machine that is fit for measuring."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe(threads: int) -> dict[str, Any]:
    from benchmarks.peak import LANES

    return {
        "cpu": cpu_name(),
        "float32_lanes": LANES,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": load(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "backend": os.environ.get("FASTLSTM_BACKEND", "auto"),
    }
