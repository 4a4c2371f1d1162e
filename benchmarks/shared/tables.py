"""What commands have in common: their arguments, and tables in Markdown."""

import argparse
from collections.abc import Iterable

import torch

from benchmarks.shared import machine
from fastlstm.commands import positive

Options = argparse.Namespace
NOISY = "noisy, no result"


def parser(name: str, doc: str | None, rounds: int | None = 31, threads: bool = True) -> argparse.ArgumentParser:
    """Return the parser of a command of this folder, whose help is the docstring of its module."""
    options = argparse.ArgumentParser(
        f"python -m benchmarks.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds:
        options.add_argument("--rounds", "--pairs", type=positive, default=rounds, help=f"interleaved ({rounds})")
    if threads:
        options.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="as torch chooses")
    return options


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def print_table(header: list[str], rows: Iterable[list[str]]) -> None:
    """Print a line on the machine, and each row once it has been measured."""
    print(f"{machine.header()}\n", *table(header, []), sep="\n", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def ratio_text(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
