"""Small kernels in PTX, for tests of single instructions."""

from typing import Any

import torch

from tests.ptx.device import Device


def kernel(body: str, *parameters: str, threads: int = 32) -> str:
    """A module of one kernel: its body, where `[name]` is a parameter that holds an address."""
    listed = ",\n".join(f"\t.param .u64 {name}" for name in parameters)
    return f".visible .entry test(\n{listed}\n)\n.reqntid {threads}\n{{\n{body}\n\tret;\n}}\n"


def executed(
    body: str, *, threads: int = 32, shared_bytes: int = 0, grid: int = 1, **tensors: torch.Tensor,
) -> Device:  # fmt: skip
    """The device after it ran a body. There %rd90 and on are the tensors' addresses, and %r90 is the thread."""
    loads = [f"\tld.param.b64 %rd{90 + n}, [{name}];" for n, name in enumerate(tensors)]
    text = kernel("\n".join(["\tmov.u32 %r90, %tid.x;", *loads, body]), *tensors, threads=threads)
    device = Device()
    arguments: dict[str, Any] = dict(tensors)
    device.run(text, arguments, (grid,), shared_bytes)
    return device
