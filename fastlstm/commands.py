"""Command lines whose errors are one line that names the argument, what it must be and what it was."""

import argparse
import io
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeVar

from fastlstm.files import FileError
from fastlstm.version import __version__

N = TypeVar("N", int, float)


class Parser(argparse.ArgumentParser):
    """A command line with `--version`, whose help ends with `epilog` as it is."""

    def __init__(self, prog: str, description: str, epilog: str, usage: str | None = None):
        super().__init__(prog, usage, description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--version", action="version", version=f"fastlstm {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage

    def run(self, argv: Sequence[str] | None, work: Callable[["Parser", argparse.Namespace], int]) -> int:
        """Do `work`, called with this parser and what `argv` says. Return its exit code, or 130 after Ctrl-C. A
        file that cannot be written is an error. Characters that standard output cannot encode, as odd bytes in names,
        are escaped.
        """
        args = self.parse_args(argv)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return work(self, args)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except FileError as error:
            self.error(str(error))

    @contextmanager
    def naming(self, argument: str, kind: type[Exception]) -> Iterator[None]:
        """End with an error that names `argument` where an exception of `kind` is raised within."""
        try:
            yield
        except kind as error:
            self.error(f"argument {argument}: {error}")

    def make_directory(self, argument: str, path: Path) -> None:
        """Make `path`, or end with an error that names `argument`."""
        with self.naming(argument, OSError):
            path.mkdir(parents=True, exist_ok=True)


def whole_number(low: int, high: int, text: str) -> int:
    return _number(int, text, lambda value: low <= value <= high, f"whole number from {low} to {high}")


def positive(text: str) -> int:
    return whole_number(1, 2**31 - 1, text)


def positive_float(text: str) -> float:
    return _number(float, text, lambda value: 0 < value < math.inf, "number above 0")


def probability(text: str) -> float:
    return _number(float, text, lambda value: 0 <= value < 1, "number from 0 to below 1")


def _number(kind: type[N], text: str, fits: Callable[[N], bool], wanted: str) -> N:
    with suppress(ValueError):
        if fits(value := kind(text)):
            return value
    raise argparse.ArgumentTypeError(f"must be a {wanted}, got {text!r}")
