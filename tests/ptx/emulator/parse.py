"""PTX text as a list of instructions. PTX ISA, "Syntax" and "Instruction Operands"."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
WIDTHS = {"%p": 1, "%rs": 16, "%r": 32, "%rd": 64}  # as LLVM names registers


class Register(NamedTuple):
    number: int
    name: str
    width: int


class Immediate(NamedTuple):
    text: str


class Address(NamedTuple):
    """[base + offset]: the base is a register, or the name of a parameter or of shared memory."""

    base: Register | str
    offset: int


Operand: TypeAlias = (
    Register | Immediate | Address | list | str
)  # a list in braces; a special register, label, variable


@dataclass
class Instruction:
    opcode: str
    operands: list[Operand]
    guard: Register | None
    negated: bool
    line: int
    text: str
    where: str  # the source line that .loc names
    parts: list[str] = field(init=False)  # the opcode, cut at its dots

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")


@dataclass
class Kernel:
    name: str
    parameters: list[str]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, Register] = field(default_factory=dict)


def parse(text: str) -> Kernel:
    """Return the one kernel of a module."""
    start = text.index(".visible .entry")
    head, rest = text[start:].split("\n{", 1)
    body, first_line = rest.split("\n}", 1)[0], text[: text.index("\n{", start) + 2].count("\n") + 1
    name, threads = re.search(r"\.entry (\w+)\(", head)[1], int(re.search(r"\.reqntid (\d+)", head)[1])
    kernel = Kernel(name, re.findall(r"\.param \S+.*?(\w+)(?=,?\s*\n|\s*\))", head), threads)
    pending, where = "", "?"
    for number, line in enumerate(body.split("\n"), first_line):
        if found := re.match(r"\s*\.loc\s.*//\s*(\S+)\s*$", line):
            where = found[1]
        line = line.split("//")[0].strip()
        if found := re.match(r"(\$?\w+):$", line):
            kernel.labels[found[1]] = len(kernel.instructions)
        elif not line.startswith("."):
            pending = f"{pending} {line}".strip()
            if pending.endswith(";"):
                for statement in filter(None, map(str.strip, pending.split(";"))):
                    kernel.instructions.append(_instruction(statement, number, where, kernel.registers))
                pending = ""
    return kernel


def _instruction(statement: str, line: int, where: str, known: dict[str, Register]) -> Instruction:
    found = STATEMENT.fullmatch(statement)
    if not found:
        raise NotImplementedError(f"a statement must be an instruction, got {statement!r}")
    negated, guard, opcode, rest = found.groups()
    operands = [_operand(part, known) for part in _split(rest)]
    text = " ".join(statement.split())
    return Instruction(opcode, operands, _register(guard, known) if guard else None, negated == "!", line, text, where)


def _split(text: str) -> list[str]:
    """The operands: cut at commas outside of brackets. `d|p` is two."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if depth == 0 and character in ",|":
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _register(name: str, known: dict[str, Register]) -> Register:
    width = WIDTHS[re.match(r"%[a-z]+", name)[0]]
    return known.setdefault(name, Register(len(known), name, width))


def _operand(text: str, known: dict[str, Register]) -> Operand:
    if text.startswith("{"):
        return [_operand(part, known) for part in _split(text[1:-1])]
    if text.startswith("["):
        base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
        return Address(_register(base, known) if base.startswith("%") else base, int(offset or "0", 0))
    if re.fullmatch(r"%(p|rs|r|rd)\d+", text):
        return _register(text, known)
    return Immediate(text) if re.match(r"-?\d", text) else text
