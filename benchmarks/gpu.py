"""Everything a GPU has to decide, in under eight minutes: checks, times against cuDNN and others, training.

    python -m benchmarks.gpu [--minutes 7.5] [--out benchmarks/results] [--dry-run]

All kernels are first compiled, by several processes at once; then the tests run, and then nothing but what is timed.
Times are medians of CUDA events, the L2 cache flushed before each call, eager and replayed from a CUDA graph, rounds of
all contenders interleaved: torch.nn.LSTM, fastlstm, and where they are installed TorchRL's and FlashRNN's Triton
kernels. The JSON file is written anew after every result, and every part runs in a process of its own: one that fails,
hangs or takes the device down loses its own result and no other. At the end follow a chart, and for each goal whether
it is met; speeds are judged by eager calls. `--dry-run`, with TRITON_INTERPRET=1 in the environment, takes tiny layers
on the CPU and nothing else: it shows that the script runs.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import machine
from benchmarks.gpu_goals import GOALS, SMALLEST, judged, speeds, told
from benchmarks.gpu_layers import FRESH, MEASURED, MODES, SHAPES, TINY
from benchmarks.gpu_rivals import installed
from benchmarks.report import replaced
from fastlstm.backends.triton.device import INTERPRET

ROOT = Path(__file__).parents[1]
LAYERS = [sys.executable, "-m", "benchmarks.gpu_layers"]
STALL = 75.0  # seconds without a line after which a layer's process counts as hung: to compile the loop takes a minute
# Seconds for each part, at most: compilation; tests; the row-LSTM; its training; transforms and sanitizers at the end.
# A kernel compiles in a second, a process starts in ten. What is left, and what a part leaves, is the other layers'.
COMPILE, TESTS, FIRST, TRAINING, LAST = 60.0, 120.0, 45.0, 45.0, 85.0
COMPILERS = 12  # processes, beside those that compile for the sanitizers
OUTPUT = 500_000  # characters of each command's that are kept: all that a sanitizer reports
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
EVERY = [*PYTEST, "-m", "slow or not slow"]  # of long matrices each case too: here a case takes milliseconds
# Each test of the kernels runs in one of these, side by side: most of the time is compilation
KINDS = [
    f"{kind} and {name}" for kind in ("resident", "stepwise") for name in ("ieee", "tf32", "not ieee and not tf32")
]
KINDS += ["not resident and not stepwise"]
KERNELS = [f"tests/backends/triton/test_{name}.py" for name in ("triton", "triton_choice")]
MASKS = "tests/backends/triton/test_lengths_and_resets.py"
TRANSFORMS = [f"tests/autograd/test_{name}.py" for name in ("transforms", "second_order", "ensembles")]
TRANSFORMS += ["tests/layers/test_masks.py"]
OFFSETS = "tests/backends/triton/test_triton_offsets.py"
DETERMINISM = [*PYTEST, "-k", "triton", "tests/plan/test_determinism.py"]
TRAIN = [sys.executable, "-m", "fastlstm.train", "--device", "cuda", "--compare", "--out", "runs/gpu"]
HOST = [sys.executable, "-m", "benchmarks.host", "--calls", "500"]  # beside the training, on a core of its own
ACCURACY = 95.0  # per cent of all test images: on the CPU the seeds 0 to 4 reach 96.20 to 96.67
EXERCISE = [*LAYERS, "--exercise"]
BACKENDS = ("triton", "triton-tf32", "triton-ieee")
OURS = [option for name in ("forward", "backward", "pack") for option in ("--kernel-name", f"kns={name}_kernel")]
# What each tool is told. Initcheck watches all kernels, since what one that it leaves out has written counts as never
# written; of what it finds, only what names our kernels is held against them.
TOOLS = {
    "memcheck": [*OURS, "--report-api-errors", "no", "--error-exitcode", "1"],
    "racecheck": [*OURS, "--error-exitcode", "1"],
    "synccheck": [*OURS, "--error-exitcode", "1"],
    "initcheck": ["--print-limit", "1000"],
}


def items(dry_run: bool) -> tuple[list[str], list[str]]:
    """The row-LSTM's, which come before all else, and the others in the order of their weight: time may run out.

    Rivals come in items of their own, where they are installed: TorchRL tries many tiles at its first call, and the
    loop compiles for a minute.
    """
    if dry_run:
        return [], [f"{n}:{precision}:" for n in range(len(TINY)) for precision in ("ieee", "tf32")]
    goals = [f"{SHAPES.index(shape)}:{precision}:" for shape, precision in GOALS]
    first, goals = goals[:2], goals[2:]
    small = SHAPES.index(SMALLEST)
    rivals = [f"{item}torchrl" for item in (*first, *goals)] * installed("torchrl")
    rivals += [f"{small}:{precision}:flashrnn" for precision in ("bf16", "tf32")] * installed("flashrnn")
    grus = [f"{n}:{p}:" for n in range(len(SHAPES), len(MEASURED)) for p in ("bf16", "tf32")]
    every = [f"{n}:{p}:" for p in ("tf32", "bf16", "fp16", "ieee") for n in range(len(SHAPES))]
    rest = [item for item in every if item not in (*first, *goals)]
    return first, [*goals, *rivals, *grus, *rest, f"{first[1]}torch.compile"]


def lines(
    command: Sequence[str], wanted: Sequence[str], deadline: float, stall: float = STALL
) -> Iterator[dict[str, Any]]:
    """What a child says of the items, and which it did not live to say anything of. Where one dies, stalls or asks for
    it, another goes on after the item it was at; at the deadline, a moment of time.monotonic, the rest are not reached.
    """
    remaining = list(wanted)
    while remaining and time.monotonic() < deadline:
        process = _start([*command, *remaining], stdout=subprocess.PIPE)
        assert process.stdout is not None
        at = None
        watch = _watch(process, deadline, stall)
        for text in process.stdout:
            watch.cancel()
            watch = _watch(process, deadline, stall)
            try:
                line = json.loads(text)
                at = line["item"]
            except (ValueError, TypeError, KeyError):
                print(text, end="", flush=True)  # a library's own chatter
                continue
            yield line
        status = process.wait()
        watch.cancel()
        if status == 0:
            return
        if at is not None:
            remaining = remaining[remaining.index(at) :]
            if status == FRESH:
                del remaining[0]
                continue
        if time.monotonic() < deadline:
            yield {"item": remaining[0], "ended": status}
            if at is None:  # nor would another come further
                return
            del remaining[0]
    for item in remaining:
        yield {"item": item, "not_reached": True}


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    options |= {"encoding": "utf-8", "errors": "replace", "env": {"FASTLSTM_CHECK": "0"} | os.environ}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # with its helpers, which would hold on to the pipe and the device


def _watch(process: subprocess.Popen[str], deadline: float, stall: float) -> threading.Timer:
    watch = threading.Timer(max(0.0, min(stall, deadline - time.monotonic())), _kill, [process])
    watch.daemon = True
    watch.start()
    return watch


def shown(command: Sequence[str]) -> str:
    return " ".join(command).replace(sys.executable, "python")


def run(commands: Sequence[Sequence[str]], limit: float) -> list[dict[str, Any]]:
    """Side by side, each one's status, None where it was stopped at the limit in seconds, and the end of its output."""
    began, found = time.monotonic(), []
    with contextlib.ExitStack() as files:
        started = []
        for command in commands:
            file = files.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            name = shown(command)
            print(f"{name}: at most {limit:.0f} s", flush=True)
            started.append((name, file, _start(command, stdout=file, stderr=subprocess.STDOUT)))
        for name, file, process in started:
            status: int | None = None
            try:
                status = process.wait(max(0.0, began + limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                _kill(process)
                process.wait()
            seconds = time.monotonic() - began  # of the slowest so far
            file.seek(0)
            output = file.read()[-OUTPUT:]
            ended = "no time left" if status is None else f"status {status}"
            print(f"{name}: {ended} after {seconds:.0f} s: {(output.strip().splitlines() or [''])[-1]}", flush=True)
            found.append({"command": name, "status": status, "seconds": seconds, "output": output})
    return found


def show(line: dict[str, Any]) -> None:
    if row := line.get("row"):
        ratios = ", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in row["ratios"].items())
        print(
            f"{row['name']:24} {row['precision']:5} {row['mode']:10} {row['way']:6}"
            f" {row['microseconds_a_step']:9.2f} us a step; times as long: {ratios}", flush=True,
        )  # fmt: skip
    for name, reason in line.get("left_out", {}).items():
        print(f"{line['item']}: without {name}: {reason.splitlines()[0]}", flush=True)
    if "failed" in line:
        print(f"{line['item']} failed: {line['failed'].strip().splitlines()[-1]}", flush=True)
    if "ended" in line:
        print(f"{line['item']} ended its process with status {line['ended']}", flush=True)
    if "not_reached" in line:
        print(f"{line['item']} was not reached", flush=True)


class Report:
    """What has been found so far, and its file, written after each addition."""

    def __init__(self, options: argparse.Namespace) -> None:
        device = "none (dry run)" if options.dry_run else torch.cuda.get_device_name()
        date = datetime.date.today().isoformat()
        name = "gpu-dry-run" if options.dry_run else f"{machine.slug(device)}-{date}"
        self.path = options.out / f"{name}.json"
        versions = {name: machine.version(name) for name in ("fastlstm", "torch", "triton", "torchrl", "flashrnn")}
        self.found: dict[str, Any] = {
            "device": device, "date": date, "versions": versions, "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(), "rounds": options.rounds,
            "results": [], "left_out": {}, "failures": [], "not_reached": [], "commands": [],
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)

    def take(self, line: dict[str, Any]) -> None:
        show(line)
        if "row" in line:
            self.found["results"].append(line["row"])
        self.found["left_out"].update({f"{line['item']} {k}": v for k, v in line.get("left_out", {}).items()})
        if "failed" in line or "ended" in line:
            self.found["failures"].append(line)
        if "not_reached" in line:
            self.found["not_reached"].append(line["item"])
        if "began" not in line:
            self.write()

    def run(self, commands: Sequence[Sequence[str]], limit: float, deadline: float) -> None:
        """At most until the deadline; what finds no time left is not reached."""
        left = min(limit, deadline - time.monotonic())
        if left > 0:
            done = run(commands, left)
            self.found["commands"] += done
            self.found["not_reached"] += [entry["command"] for entry in done if entry["status"] is None]
        else:
            self.found["not_reached"] += map(shown, commands)
        self.write()

    def write(self) -> None:
        text = json.dumps(self.found, indent=1) + "\n"
        replaced(self.path, lambda path: path.write_text(text))

    @property
    def failed(self) -> list[str]:
        commands = (entry["command"] for entry in self.found["commands"] if entry["status"])
        return [*dict.fromkeys(line["item"] for line in self.found["failures"]), *commands]


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each one's verdict: FAIL where anything misses it, else "not measured" where something is not known yet."""
    return [*speeds(found), same_bits(found), checked(found), trained(found), sanitized(found)]


def status(found: dict[str, Any], command: Sequence[str]) -> tuple[int | None, str]:
    """None where it has not ended or not run; and its output."""
    entries = [entry for entry in found["commands"] if entry["command"] == shown(command)]
    return (entries[0]["status"], entries[0]["output"]) if entries else (None, "")


def same_bits(found: dict[str, Any]) -> dict[str, Any]:
    ended, _ = status(found, DETERMINISM)
    twice = all(row["same_bits"] for row in found["results"]) if found["results"] else None
    facts = {"tests": None if ended is None else ended == 0, "each layer twice": twice}
    return judged("the same bits run after run", facts)


def checked(found: dict[str, Any]) -> dict[str, Any]:
    """Where this passes, `MEASURED` of `fastlstm.backends.triton.first_call` may have the chip."""
    ended = {command[-1]: status(found, command)[0] for command in first_calls()}
    return judged("first calls pass their check", {a: None if b is None else b == 0 for a, b in ended.items()})


def trained(found: dict[str, Any]) -> dict[str, Any]:
    ended, output = status(found, TRAIN)
    accuracy = re.search(r"test accuracy, all \d+ +([\d.]+)%", output)
    fact = f"{accuracy[1]} % of the test images" if accuracy else "test images"
    held = ended == 0 and accuracy is not None and float(accuracy[1]) >= ACCURACY
    return judged(f"training reaches {ACCURACY} %", {fact: None if ended is None else held})


def sanitized(found: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, bool | None] = {}
    for command in sanitizers():
        ended, output = status(found, command)
        named = "initcheck" in command and re.search(r"^=+ +at .*(forward|backward|pack)_kernel", output, re.MULTILINE)
        facts[f"{command[2]} {command[-1]}"] = None if ended is None else ended == 0 and not named
    return judged("compute-sanitizer is clean", facts or {"compute-sanitizer is not installed": None})


def chart(report: dict[str, Any]) -> Figure:
    """How many times as long torch's own layer takes, from graphs where there are any."""
    way = "graph" if any(row["way"] == "graph" for row in report["results"]) else "eager"
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, mode in zip(panels, MODES, strict=True):
        rows = [row for row in report["results"] if row["mode"] == mode and row["way"] == way]
        draw(axes, rows)
        axes.set_title(f"{mode}, {way}", loc="left")
    figure.suptitle(f"Speed relative to nn.LSTM or nn.GRU, same precision: {report['device']}")
    return figure


def draw(axes: Axes, rows: list[dict[str, Any]]) -> None:
    ratios = [(row, row["ratios"][name]) for row in rows for name in ("nn.LSTM", "nn.GRU") if name in row["ratios"]]
    labels = [f"{row['name']} {row['precision']}" for row, _ in ratios]
    axes.barh(range(len(ratios)), [ratio["median"] for _, ratio in ratios])
    axes.set_yticks(range(len(ratios)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="after which what is left is dropped (7.5)")
    parser.add_argument("--rounds", type=int, default=31, help="of each measurement, at most (31)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the two files")
    parser.add_argument("--dry-run", action="store_true", help="tiny layers on the CPU, in Triton's interpreter")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"argument --rounds: must be at least 1, got {options.rounds}")
    if options.dry_run and not INTERPRET:
        parser.error("argument --dry-run: needs TRITON_INTERPRET=1 in the environment")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --dry-run needs none")
    return options


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def compilers(layers: list[str]) -> list[list[str]]:
    """What compiles all that will be timed or sanitized."""
    layers = sorted({item.rsplit(":", 1)[0] + ":" for item in layers})
    parts = [part for n in range(COMPILERS) if (part := layers[n::COMPILERS])]
    return [*([*LAYERS, "--compile", *part] for part in parts), *([*EXERCISE, backend] for backend in BACKENDS)]


def checks() -> list[list[str]]:
    """The tests of the kernels."""
    tests = [[*EVERY, "-k", kind, *files] for files in (KERNELS, [MASKS]) for kind in KINDS]
    return [*tests, DETERMINISM, *first_calls()]


def first_calls() -> list[list[str]]:
    """Every kind of layer, whose first call checks itself. Elsewhere the check is off: it would compile, and wait."""
    return [["env", "FASTLSTM_CHECK=1", *EXERCISE, backend] for backend in BACKENDS]


def last_checks() -> list[list[str]]:
    tests = [[*PYTEST, "-k", "triton", name] for name in TRANSFORMS]
    return [*tests, [*PYTEST, OFFSETS], *sanitizers()]


def sanitizers() -> list[list[str]]:
    if (found := sanitizer()) is None:
        return []
    brief = ["--show-backtrace", "no"]  # of the host, Python's
    return [
        [found, "--tool", tool, *options, *brief, *EXERCISE, backend]
        for tool, options in TOOLS.items()
        for backend in BACKENDS
    ]


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    deadline, report = time.monotonic() + 60 * options.minutes, Report(options)
    first, others = items(options.dry_run)
    layers = [*LAYERS, "--rounds", str(options.rounds), *["--dry-run"] * options.dry_run]
    here = not options.dry_run
    if here:
        report.run(compilers([*first, *others]), COMPILE, deadline)
        report.run(checks(), TESTS, deadline)
    for line in lines(layers, first, min(deadline, time.monotonic() + FIRST)):
        report.take(line)
    if here:
        report.run([TRAIN, HOST], TRAINING, deadline)
    for line in lines(layers, others, deadline - here * LAST):
        report.take(line)
    if here:
        report.run(last_checks(), LAST, deadline)
    report.found["goals"] = goals(report.found)
    report.write()
    print(*map(told, report.found["goals"]), report.path, sep="\n")
    print(replaced(report.path.with_suffix(".png"), lambda path: chart(report.found).savefig(path, dpi=150)))
    if report.failed:
        sys.exit(f"failed: {', '.join(report.failed)}; what they said is in the JSON file")


if __name__ == "__main__":
    main()
