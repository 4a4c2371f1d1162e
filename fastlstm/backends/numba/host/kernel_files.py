"""Files in which compiled kernels stay for later processes: one for each kernel, kind of processor, and set of numba's
settings.

Numba's own cache trusts what it finds: a damaged file stops every call, or runs, and processes that write at once can
leave an index to another processor's code. Here a file is written whole and begins with a checksum, then a digest of
all that the code depends on. A file with another digest, as an upgrade leaves it, is replaced.
"""

import hashlib
import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core.registry import cpu_target

from fastlstm.backends.numba.llvm.sources import fingerprint
from fastlstm.files import FileError, read, replacing

_settings = vars(numba.config)  # as they are at any time
if _settings["DISABLE_JIT"]:
    raise ImportError("the setting NUMBA_DISABLE_JIT forbids it to compile")

QUIET = os.environ.get("FASTLSTM_QUIET", "0") not in ("", "0")
DIGEST_BYTES = 32
MOST_BYTES = 1 << 26  # of a file: a thousand times the largest kernel's
# Of numba's settings all count but those of its own cache, of GPUs and threads, and of what it prints
_NO_CODE = re.compile("^_|CACHE|COLOR|CUDA|DUMP|GDB|HELP|THREAD|TRACE|WARN")
_CODE = [name for name in _settings if name.isupper() and not _NO_CODE.search(name)]
_sources = fingerprint()
_told: set[Path] = set()


class Kernel(NamedTuple):
    """A compiled kernel: the address of its C function, whether it comes from a file, and what its code lives in."""

    address: int
    is_loaded: bool
    owner: Any


@cache
def folder() -> Path | None:
    """Return the folder of the kernels' files, numba's for this package, or None if none can be written."""

    def beside_the_kernels() -> None:  # numba chooses the folder by the file that a function stands in
        pass

    try:
        return Path(str(numba.njit(cache=True)(beside_the_kernels).stats.cache_path))
    except RuntimeError:
        return None


@cache
def _processor() -> tuple[str, str, str]:
    """Return the triple, the name and the features of the processor that numba compiles for."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, features


def _target() -> tuple[object, ...]:
    """Return what numba compiles for: the processor, and the settings as they are now."""
    return *_processor(), *((name, _settings[name]) for name in _CODE)


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _path_of(name: str) -> Path | None:
    """Return the path of a kernel's file. Each target has its own, and each version replaces it."""
    place = folder()
    return None if place is None else place / f"{name}-{_digest(_target()).hex()[:16]}.kernel"


def _identity(name: str) -> bytes:
    """Return a digest of all that a kernel's code depends on."""
    return _digest(name, _sources, _target(), numba.__version__, llvmlite.__version__)


def load(name: str) -> Kernel | None:
    """Return the kernel of this name from its file, or None. A file that cannot be read is named on standard error."""
    path = _path_of(name)
    if path is None:
        return None
    try:
        content = read(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        _tell(path, f"{path}: cannot be read ({error.strerror}); the kernel is compiled again")
        return None
    checksum, checked = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if checksum != hashlib.sha256(checked).digest():
        _tell(path, f"{path}: is damaged; the kernel is compiled again")
        return None
    identity, named_code = checked[:DIGEST_BYTES], checked[DIGEST_BYTES:]
    if identity != _identity(name):
        return None
    symbol, _, code = named_code.partition(b"\0")
    machine = llvm.Target.from_triple(_processor()[0]).create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Kernel(engine.get_function_address(symbol.decode()), True, engine)


def store(name: str, compiled: Any) -> Kernel:
    """Write a kernel to its file, and return it. A line on standard error says if that is impossible."""
    path = _path_of(name)
    if path is not None:
        _, _, (code, _) = compiled._library.serialize_using_object_code()  # a private name, as old as numba's cache
        checked = _identity(name) + compiled.native_name.encode() + b"\0" + code
        try:
            with replacing(path) as file:
                file.write(hashlib.sha256(checked).digest() + checked)
        except FileError as error:
            _tell(path, f"{error}; later processes compile the kernel again")
    return Kernel(compiled.address, False, compiled)


def _tell(path: Path, text: str) -> None:
    """Write a line on standard error, once for each file."""
    if path not in _told:
        _told.add(path)
        say(f"fastlstm: {text}")


def say(text: str, end: str = "\n") -> None:
    """Write text on standard error, unless the user wants quiet."""
    if not QUIET and sys.stderr is not None:
        with suppress(OSError, ValueError):  # a stream that is closed, or a full disk, must not stop a call
            print(text, end=end, file=sys.stderr, flush=True)
