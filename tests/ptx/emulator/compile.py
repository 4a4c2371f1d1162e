"""Triton's compiler, for a chip that need not be there, up to PTX."""

from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit


@dataclass
class Compiled:
    ptx: str
    shared_bytes: int
    paths: list[tuple[Any, ...]]  # of what the kernel takes, in order: an argument's name, and places in its tuple

    def taken(self, bound: dict[str, Any]) -> dict[str, Any]:
        """Return what the kernel takes of these arguments, by name."""
        found = {}
        for name, *places in self.paths:
            value = bound[name]
            for place in places:
                value = value[place]
            found[".".join(map(str, (name, *places)))] = value
        return found


class Compiler:
    """The kernels of one chip, each compiled once in a process.

    Triton's own binder specialises them to their arguments: to divisibility by 16, to integers of 1 and so on.
    """

    def __init__(self, chip: int):
        self.backend = make_backend(GPUTarget("cuda", chip, 32))
        self.known: dict[str, Compiled] = {}
        self.binders: dict[Any, Any] = {}

    def __call__(self, function: Any, arguments: tuple, options: dict[str, Any]) -> tuple[Compiled, dict[str, Any]]:
        """Return the kernel, and its arguments by name."""
        if function not in self.binders:
            signature = function.signature, function.params, self.backend
            self.binders[function] = jit.create_function_from_signature(*signature)
        options = {"debug": False, **options}
        bound, specialization, rest = self.binders[function](*arguments, **options)
        key = str((function.cache_key, specialization, sorted(rest.items())))
        if key not in self.known:
            packed = function._pack_args(self.backend, options, bound, specialization, rest)
            self.known[key] = self._compile(function, *packed)
        return self.known[key], bound

    def _compile(self, function: Any, options: Any, signature: dict, constants: dict, attributes: dict) -> Compiled:
        source, hashed = ASTSource(function, signature, constants, attributes), CUDABackend.hash
        with (  # without ptxas, and apart in Triton's cache, which would give the empty binary to others
            mock.patch.object(CUDABackend, "make_cubin", return_value=b""),
            mock.patch.object(CUDABackend, "hash", lambda self: f"{hashed(self)}-ptx"),
        ):
            compiled = triton.compile(source, target=self.backend.target, options=options.__dict__)
        paths = [path for name, kind in signature.items() for path in _paths((name,), kind)]
        return Compiled(compiled.asm["ptx"], compiled.metadata.shared, paths)


def _paths(path: tuple[Any, ...], kind: Any) -> list[tuple[Any, ...]]:
    """The paths of all values of an argument, whose kind may be a tuple of kinds, but for constants."""
    if isinstance(kind, tuple):
        return [found for place, part in enumerate(kind) for found in _paths((*path, place), part)]
    return [] if kind == "constexpr" else [path]


@cache
def compiler(chip: int) -> Compiler:
    return Compiler(chip)
