"""Small kernels in PTX, for tests of single instructions."""

from typing import Any

import torch

from tests.ptx.device import Device

REGISTERS = {2: "rs", 4: "r", 8: "rd"}


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


def computed(instruction: str, result: torch.dtype, *operands: Any) -> list[Any]:
    """What an instruction gives, for each element of the operands, tensors of up to 32 elements.

    In the instruction {d} is the result and {a}, {b}, {c} are the operands. A predicate {p} becomes 1 or 0.
    """
    given = {name: torch.as_tensor(a).reshape(-1) for name, a in zip("abc", operands)}
    count = next(iter(given.values())).numel()
    given = {name: torch.cat([a, a[-1:].expand(32 - count)]).contiguous() for name, a in given.items()}
    out = torch.zeros(32, dtype=result)
    names, lines = {"p": "%p1"}, []
    for n, (name, a) in enumerate([*given.items(), ("d", out)]):
        size = a.element_size()
        names[name] = f"%{REGISTERS[size]}{n + 1}"
        lines.append(f"mul.wide.u32 %rd{50 + n}, %r90, {size}; add.s64 %rd{60 + n}, %rd{50 + n}, %rd{90 + n};")
        if name != "d":
            lines.append(f"ld.global.b{8 * size} {names[name]}, [%rd{60 + n}];")
    lines.append(instruction.format(**names))
    if "{p}" in instruction:
        lines.append(f"selp.b32 {names['d']}, 1, 0, %p1;")
    lines.append(f"st.global.b{8 * out.element_size()} [%rd{60 + len(given)}], {names['d']};")
    device = executed("\n".join(lines), **given, d=out)
    assert not device.findings, device.findings
    return out[:count].tolist()
