"""What commands have in common: their arguments, and tables in Markdown."""

from collections.abc import Iterable

from benchmarks.shared.clock import times_as_fast
from fastlstm.commands import Parser

NOISY = "noisy, no result"


def parser(name: str, doc: str | None) -> Parser:
    """Return the parser of a command of this folder, whose help is the docstring of its module."""
    return Parser(f"python -m benchmarks.{name}", doc or "", "")


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{times_as_fast(ratio):.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
