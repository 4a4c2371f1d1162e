"""What runs here and why: `info` returns it, and `python -m fastlstm` prints it."""

import ctypes
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastlstm.backends import cpu, csrc, dispatch, numba, settings
from fastlstm.backends.triton import device as gpu
from fastlstm.cells.library import CELLS
from fastlstm.version import __version__


def info() -> dict[str, Any]:
    """Return what fastlstm runs on here. The first call imports numba, which takes a second.

    Returns:
        A dictionary of plain values, which `json.dumps` takes:

        - ``versions``: of fastlstm, Python, torch, numba and triton; None for a package that is not installed.
        - ``processor``: its ``name``, the number of its ``cores``, and the number of ``threads`` that torch uses. This
          process may use only the number of ``usable`` processors, which a call's threads do not exceed. The ``reason``
          is "affinity", or the quota of a control group, or None if all cores are usable.
        - ``instructions``: for numba and native the vector instructions that the kernels use, such as "avx512", or None
          where the backend cannot be used. "+amx" and "+vdpbf16ps" are instructions for products of bfloat16.
        - ``gpus``: the names of the GPUs that torch finds.
        - ``default``: the backend of layers that name none, as `FASTLSTM_BACKEND` or `fastlstm.use_backend` sets it.
        - ``auto``: what "auto" takes for float32, as ``{device: {cell: backend}}``.
        - ``backends``: for each backend None, or the reason why it cannot run float32 here.
        - ``caches``: for numba and triton the folder in which compiled kernels stay, or None where none can be written.
        - ``notes``: sentences on what is not as it should be.
    """
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    report: dict[str, Any] = {
        "versions": {
            "fastlstm": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: _version(package) for package in ("numba", "triton")},
        },
        "processor": {"name": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        | {"usable": cpu.PROCESSORS, "reason": cpu.PROCESSORS_REASON},
        "instructions": {"numba": _of_numba(), "native": _of_native()},
        "gpus": gpus,
        "default": settings.named(None),
        "auto": {name: _taken(name) for name in ["cpu", *["cuda"] * bool(gpus)]},
        "backends": {name: _reason(name) for name in (*dispatch.FUSED, "aten")},
        "caches": {"numba": numba.cache_folder(), "triton": _of_triton()},
    }
    return {**report, "notes": _notes(report)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def _of_numba() -> str | None:
    if _reason("numba") is not None:
        return None
    from fastlstm.backends.numba.llvm.simd import IS_NEON, VECTOR_BYTES  # not above: it imports numba

    narrow = "neon" if IS_NEON else "base"
    products = {0: "", 1: "+vdpbf16ps"}.get(numba.max_components(), "+amx")
    return {64: "avx512", 32: "avx2"}.get(VECTOR_BYTES, narrow) + products


def _of_native() -> str | None:
    if _reason("native") is not None:
        return None
    name = ctypes.CDLL(str(csrc.LIBRARY)).fastlstm_instructions_name
    name.restype = ctypes.c_char_p
    name_of_set: bytes = name(0)  # the widest
    return name_of_set.decode()


def _of_triton() -> str | None:
    if _version("triton") is None:
        return None
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # which raises nothing where there is no home
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return str(folder) if os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK) else None


def _taken(device: str) -> dict[str, str]:
    call: dict[str, Any] = {"masked": False, "inner_states": False, "warn": False}
    where = torch.device(device)
    return {cell.key: dispatch.choose("auto", where, torch.float32, cell=cell, **call) for cell in CELLS}


def _reason(name: str) -> str | None:
    """Return why the backend of this name cannot run float32 on any device that is here, or None."""
    needs_gpu = name in dispatch.TRITON and not gpu.INTERPRET
    if needs_gpu and not torch.cuda.is_available():
        return f"the {name} backend needs an NVIDIA GPU, and torch finds none"
    reason: str | None = dispatch.module(name).supports(torch.device("cuda" if needs_gpu else "cpu"), torch.float32)
    return reason


def _notes(report: dict[str, Any]) -> list[str]:
    notes = []
    if report["backends"]["numba"] is None and report["caches"]["numba"] is None:
        instead = "every process compiles for itself"
        if report["backends"]["native"] is None:
            instead = "auto takes native for the cells that it has, and every process compiles the others for itself"
        named = os.environ.get("NUMBA_CACHE_DIR")
        folder = "a folder for the cache" if named is None else f"{named}, where this user cannot write"
        notes.append(f"No folder for numba's cache can be written: {instead}. NUMBA_CACHE_DIR names {folder}.")
    if report["gpus"] and (reason := report["backends"]["triton"]) is not None:
        notes.append(
            f"No kernels of this package run on the GPU: {reason}. torch's own layers run there instead, with lengths "
            "too. What they lack, such as resets and other cells, runs in plain PyTorch."
        )
    if not csrc.LIBRARY.exists() and os.name != "nt":
        notes.append(
            "The native backend was not built. If GCC or Clang is installed, two commands build it: 'pip cache remove "
            "fastlstm', then 'pip install --force-reinstall --no-deps' with what was installed (fastlstm, a path)."
        )
    if report["processor"]["threads"] > (usable := report["processor"]["usable"]):
        notes.append(
            "torch uses more threads than this process may use processors: its own operations are faster after "
            f"torch.set_num_threads({usable})."
        )
    return notes
