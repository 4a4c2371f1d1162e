"""Glue for libraries whose recurrent layers fastlstm can run, in one module for each library.

`import fastlstm` imports none of these modules. Each of them imports its library when it is used.
"""

import re
from importlib import import_module, metadata
from typing import Any


def import_library(module: str, package: str, oldest: str) -> Any:
    """Return a module of a library, or raise ImportError if its package, by pip's name, is absent or too old."""
    wanted = f"fastlstm.integrations needs {package} {oldest} or newer"
    try:
        version, library = metadata.version(package), import_module(module)
    except ImportError as error:  # which also stands for a package without metadata
        raise ImportError(f"{wanted}, which cannot be imported: {error}") from error
    if _numbers(version) < _numbers(oldest):
        raise ImportError(f"{wanted}, got {version}")
    return library


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
