"""The emulator in the place of a GPU: within `emulated` the Triton backend runs on CPU tensors."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.ptx.emulator.findings import Findings
from tests.ptx.emulator.global_memory import Global
from tests.ptx.emulator.machine import Machine
from tests.ptx.emulator.parse import Kernel, parse
from tests.ptx.emulator.program import Operation, prepare, without


@dataclass
class Device:
    """An emulated GPU.

    Attributes:
        left_out: of a kernel, by its name, the lines of PTX whose instructions do nothing. The first line is 1.
        findings: what was wrong, so far. It is false while nothing was.
        kernels: the PTX of each kernel that was launched, by the kernel's name, in order.
    """

    left_out: Mapping[str, Collection[int]] = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    kernels: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def run(self, ptx: str, arguments: dict[str, Any], grid: tuple[int, ...], shared_bytes: int = 0) -> None:
        """Run a kernel, one CTA after the other. Arguments are tensors and numbers in the order of its parameters."""
        kernel, code = _prepared(ptx)
        if lines := self.left_out.get(kernel.name):
            code = without(code, lines)
        memory = Global({name: a for name, a in arguments.items() if isinstance(a, torch.Tensor)})
        values = [memory.addresses.get(name, value) for name, value in arguments.items()]
        scratch = [0] * (len(kernel.parameters) - len(values))  # Triton's own parameters, which kernels here do not use
        parameters = {name: int(value) for name, value in zip(kernel.parameters, values + scratch, strict=True)}
        x, y, z = (*grid, 1, 1)[:3]
        self.findings.kernel = kernel.name
        with np.errstate(all="ignore"):
            for number in range(x * y * z):
                Machine(kernel, code, shared_bytes, memory, parameters, (x, y, z), self.findings, number).run()


@lru_cache(64)
def _prepared(ptx: str) -> tuple[Kernel, list[Operation]]:
    kernel = parse(ptx)
    return kernel, prepare(kernel)


@contextmanager
def emulated(
    chip: int, *, multiprocessors: int = 132, left_out: Mapping[str, Collection[int]] | None = None, stops: bool = False
) -> Iterator[Device]:
    """Within this block Triton's launches take CPU tensors and run as PTX for compute capability 10 * major + minor.

    The backend's functions, and modules with backend="triton", then run on the CPU.

    Args:
        multiprocessors: of the chip. Of few, programs take 16 rows.
        left_out: see `Device`.
        stops: raise `Fault` at the first error.

    Raises:
        RuntimeError: Triton was imported under TRITON_INTERPRET=1, so there is nothing to compile.
    """
    import triton
    from triton.runtime import jit

    from fastlstm.backends.triton import device as gpu
    from fastlstm.backends.triton import launch  # noqa: F401, with all kernels, before INTERPRET says otherwise
    from tests.ptx.emulator.compile import compiler

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must be 0 where kernels are emulated, got 1")
    device, compiled_for = Device(left_out or {}, Findings(stops)), compiler(chip)

    def run(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if warmup:  # a first call that only loads
            return
        compiled, bound = compiled_for(function, arguments, options)
        if compiled.ptx not in device.kernels[function.__name__]:
            device.kernels[function.__name__].append(compiled.ptx)
        device.run(compiled.ptx, compiled.taken(bound), grid(bound) if callable(grid) else grid, compiled.shared_bytes)

    with (
        mock.patch.object(jit.JITFunction, "run", run),
        mock.patch.object(gpu, "INTERPRET", True),  # CPU tensors are taken
        mock.patch.object(gpu, "capability", return_value=divmod(chip, 10)),
        mock.patch.object(gpu, "multiprocessors", return_value=multiprocessors),
    ):
        yield device
