"""What runs here and why, and kernels compiled ahead of their first use: `python -m fastlstm`."""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastlstm.backends import dispatch, numba, settings
from fastlstm.cells.library import CELLS
from fastlstm.cells.spec import Cell
from fastlstm.commands import Parser, positive
from fastlstm.info import info
from fastlstm.layers.rnn import RNN

TYPES = ("float32", "float64", "bfloat16", "float16")
EXAMPLES = """\
examples:
  what runs here
    python -m fastlstm
  the same as JSON
    python -m fastlstm --json
  compile both passes of an LSTM, as while an image is built
    python -m fastlstm --warm-up
  compile what a GRU of your sizes needs, in two types
    python -m fastlstm --warm-up --cell gru --input-size 80 --hidden-size 256 \\
        --dtype float32 bfloat16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print what runs here, or warm up, as `argv` says; the exit code is 0, or 2 after a bad argument."""
    parser = Parser(
        prog="python -m fastlstm",
        description="Print which backends run here and why, or compile kernels ahead of their first use.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument_group("what is printed").add_argument
    add("--json", action="store_true", help="what fastlstm.info() returns, as JSON")
    add = parser.add_argument_group("warming up").add_argument
    add("--warm-up", action="store_true", help="run both passes of a layer, which compiles what it needs")
    cells = [cell.key for cell in CELLS]
    add("--cell", nargs="+", choices=cells, metavar="CELL", help=f"of {', '.join(cells)} (default: lstm)")
    add("--input-size", type=positive, metavar="I", help="features of the input (default: 28)")
    add("--hidden-size", type=positive, metavar="H", help="hidden units (default: 128)")
    add("--batch-size", type=positive, metavar="B", help="batch rows (default: 64)")
    add("--dtype", nargs="+", choices=TYPES, metavar="TYPE", help=f"of {', '.join(TYPES)} (default: float32)")
    backends = "what runs the layer: %(choices)s (default: FASTLSTM_BACKEND, else auto)"
    add("--backend", choices=settings.NAMES, metavar="NAME", help=backends)
    return parser.run(argv, _run)


def _run(parser: Parser, args: argparse.Namespace) -> int:
    if not args.warm_up:
        for name in ("cell", "input_size", "hidden_size", "batch_size", "dtype", "backend"):
            if getattr(args, name) is not None:
                option = name.replace("_", "-")
                parser.error(f"argument --{option}: must be given with --warm-up, got --{option} alone")
        report = info()
        print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))
        return 0
    if args.json:
        parser.error("argument --json: must be left out with --warm-up, got both")
    _warm_up(parser, args)
    report = info()
    folder, reason = report["caches"]["numba"], report["backends"]["numba"]
    if folder is not None:
        print(f"numba's kernels are kept in {folder}")
    elif reason is not None:
        print(f"Nothing is kept: {reason}")
    else:
        print("Nothing is kept: no folder for numba's cache can be written. NUMBA_CACHE_DIR names one.")
    return 0


def _warm_up(parser: Parser, args: argparse.Namespace) -> None:
    """Run each layer that `args` name, and print a line that says when it was ready."""
    from fastlstm.__main__ import _run_layer  # by this name new processes can import it

    begin, device = time.perf_counter(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = args.input_size or 28, args.hidden_size or 128, args.batch_size or 64
    layers, ahead = [], []
    for key, dtype in itertools.product(args.cell or ["lstm"], args.dtype or ["float32"]):
        cell = next(cell for cell in CELLS if cell.key == key)
        of = {"device": device, "dtype": getattr(torch, dtype)}
        try:
            taken = dispatch.choose(args.backend, **of, cell=cell, masked=False, inner_states=False)
        except RuntimeError as error:
            parser.error(f"argument --backend: {error}")
        run = functools.partial(_run_layer, cell, *shape, args.backend, **of)
        size = f"{shape[0] if cell.gates_of_x else 0} inputs and {shape[1]} units"
        layers.append((f"{key} of {size} in {dtype}: {taken} is ready after", run))
        if taken.startswith("numba"):
            ahead.append(run)
    numba.compile_ahead(ahead)
    for line, run in layers:
        run()
        print(f"{line} {time.perf_counter() - begin:.1f} s", flush=True)


def _run_layer(cell: Cell, I: int, H: int, B: int, backend: Any, **of: Any) -> None:
    """Run a sequence, a single step and a step of one row, without gradients and with them. `of`: device and dtype."""
    layer = RNN(cell, I if cell.gates_of_x else 0, H, backend=backend, **of)
    for steps, rows in ((dispatch.MANY_STEPS, B), (1, B), (1, 1)):  # see `dispatch.may_use_components`
        x = torch.zeros(steps, rows, layer.input_size, **of)
        inputs = {name: torch.zeros(steps, rows, H, **of) for name in cell.inputs}
        with torch.no_grad():
            layer(x, None, inputs)
        x.requires_grad_(rows > 1)  # some of a row's kernels serve only without dx
        layer(x, None, inputs)[0].sum().backward()


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield the report of `info` as lines of text."""
    versions, processor = report["versions"], report["processor"]
    packages = (f"{name} {version or 'is not installed'}" for name, version in versions.items())
    yield f"versions      {', '.join(packages)}"
    cores, threads, usable, reason = (processor[key] for key in ("cores", "threads", "usable", "reason"))
    limit = f", of which this process may use {usable} ({reason})" if reason else ""
    most = f"; torch uses {threads} threads, and a call at most {min(threads, usable)}"
    yield f"processor     {processor['name']}, {cores} cores{limit}{most}"
    sets = (f"{backend} uses {name}" for backend, name in report["instructions"].items() if name)
    yield f"instructions  {', '.join(sets) or 'none: no backend for CPUs can be used'}"
    yield f"GPUs          {', '.join(report['gpus']) or 'torch finds none'}"
    yield f"default       {report['default']}"
    for device, taken in report["auto"].items():
        for backend in dict.fromkeys(taken.values()):
            cells = [cell for cell, name in taken.items() if name == backend]
            which = "every cell" if len(cells) == len(taken) else ", ".join(cells)
            yield f"auto on {device:5} takes {backend} for {which}"
    yield "backends"
    for name, reason in report["backends"].items():
        yield f"  {name:13} {'runs' if reason is None else reason}"
    yield "caches"
    for name, folder in report["caches"].items():
        yield f"  {name:13} {folder or 'none'}"
    yield from report["notes"]


if __name__ == "__main__":
    sys.exit(main())
