"""Registration with torch.compile, put off until somebody compiles."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls something right after a module has been imported for the first time."""

    def __init__(self, name: str, then: Callable[[], object]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then(module: ModuleType) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = execute_then  # type: ignore[method-assign]
        return spec


def _with_dynamo(then: Callable[[], object]) -> None:
    """Now, or right after torch._dynamo has been imported, which takes five times what all of fastlstm does."""
    if "torch._dynamo" in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _WhenImported("torch._dynamo", then))


def allow_in_graph(function: F) -> F:
    """`torch.compiler.allow_in_graph`."""
    _with_dynamo(lambda: torch.compiler.allow_in_graph(function))
    return function


def skip_frame(function: F) -> F:
    """Have dynamo leave the function's own frame alone, and look at those that it calls."""
    _with_dynamo(lambda: torch._dynamo.eval_frame.skip_code(function.__code__))
    return function
