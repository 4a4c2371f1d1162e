"""Everything a GPU has to decide, in under eight minutes: tests, times beside cuDNN and others, training, sanitizers.

    python -m benchmarks.gpu [--minutes 7.5] [--out benchmarks/results]

The kernels are first compiled by several processes at once. Then the tests run, and then nothing beside what is timed.
Each layer has a process of its own, so that one that fails, hangs or takes the device down loses only its own result.
The JSON file is written anew after every result. At the end follows a line for each goal.
"""

import datetime
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import layers
from benchmarks.gpu.layers import BEST_OF_CUDNN, GRUS, LARGER, ROW, SHAPES, SMALLEST, Item
from benchmarks.shared import machine
from benchmarks.shared.clock import times_as_fast
from benchmarks.shared.results import write_json
from benchmarks.shared.shapes import MODES
from benchmarks.shared.tables import parser
from fastlstm.commands import positive

ROOT = Path(__file__).parents[2]
PROCESSES = multiprocessing.get_context("forkserver")  # which imports once, and forks before CUDA starts
WIDTHS = [(shape, "bf16") for shape in (LARGER[-1], SHAPES[1], SMALLEST, *LARGER[:-1])]  # the likeliest to miss first
# rival, how many times as fast as it, in which modes and layers. Speeds are judged by eager calls.
GOALS = [
    ("nn.LSTM", 3.0, ["training"], [(ROW, "bf16"), (ROW, "tf32")]),
    ("nn.LSTM", 1.0, MODES, [(ROW, "bf16"), (BEST_OF_CUDNN, "fp16"), *WIDTHS]),
    ("torchrl", 1.0, MODES, [(ROW, "bf16"), (ROW, "tf32"), (BEST_OF_CUDNN, "fp16"), *WIDTHS]),
]
COMPILE, TESTS, LAYER, TRAINING, LAST = 60.0, 120.0, 40.0, 45.0, 85.0  # seconds for each part, at most
ACCURACY = 95.0  # per cent: on the CPU the seeds 0 to 4 reach 96.20 to 96.67
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
MASKS = "tests/backends/triton/test_lengths_and_resets.py"
KERNELS = [*(f"tests/backends/triton/test_{name}.py" for name in ("triton", "triton_choice", "triton_offsets")), MASKS]
DERIVATIVES = [
    f"tests/autograd/test_{name}.py" for name in ("any_transform", "transforms", "second_order", "ensembles")
]
CHECKS = [
    [*PYTEST, "-n", "12", "-m", "slow or not slow", *KERNELS],
    [*PYTEST, "-n", "4", "-k", "triton", *DERIVATIVES, "tests/layers/test_masks.py", "tests/plan/test_determinism.py"],
]
TRAIN = [sys.executable, "-m", "fastlstm.train", "--device", "cuda", "--compare", "--out", "runs/gpu"]
HOST = [sys.executable, "-m", "benchmarks.gpu.host", "--calls", "500"]  # beside the training, on a core of its own
OURS = [option for name in ("forward", "backward", "pack") for option in ("--kernel-name", f"kns={name}_kernel")]
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
EXACT = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]  # each tensor ends where its memory does
TOOLS = ("memcheck", "racecheck", "synccheck") if SANITIZER else ()
SANITIZERS = [
    [*EXACT, str(SANITIZER), "--tool", tool, "--error-exitcode", "1", *OURS, *PYTEST, MASKS] for tool in TOOLS
]


def items() -> list[Item]:
    """Return the layers of goals, the same beside TorchRL, which tries many tiles at its first call, and the others."""
    goals = list(dict.fromkeys(layer for *_, of in GOALS for layer in of))
    every = [(shape, precision) for precision in ("tf32", "bf16", "fp16", "ieee") for shape in SHAPES]
    every += [(shape, precision) for shape in GRUS for precision in ("bf16", "tf32")]
    others = [layer for layer in every if layer not in goals]
    groups = ((goals, False), (goals if layers.TORCHRL else [], True), (others, False))
    return [(*layer, beside) for group, beside in groups for layer in group]


def layer(item: Item, rounds: int, limit: float, measure: Callable[..., Any] = layers.measure) -> list[dict[str, Any]]:
    """Return an item's rows, from a process of its own."""
    with PROCESSES.Pool(1) as pool:
        try:
            return pool.apply_async(measure, (item, rounds)).get(limit)
        except multiprocessing.TimeoutError:
            return [layers.described(item) | {"failed": f"its process hung or crashed within {limit:.0f} s"}]


def run(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Return how a command ended, with None for a status where it was stopped at the limit, and what it printed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        output, status = process.communicate(timeout=limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with its helpers, which would hold on to the device
        output, status = process.communicate()[0], None
    name = " ".join(command).replace(sys.executable, "python")
    print(f"{'no time left' if status is None else status}: {name}: {output.strip().splitlines()[-1:]}", flush=True)
    return {"command": name, "status": status, "output": output[-500_000:]}


def verdict(goal: str, facts: dict[str, bool | None]) -> str:
    """Return a goal's line. A fact holds, does not, or is not known; without facts the goal was not measured."""
    held = False if False in facts.values() else None if None in facts.values() or not facts else True
    word = {False: "FAIL", None: "not measured", True: "pass"}[held]
    return f"{word}: {goal}: {', '.join(fact for fact in facts if facts[fact] is held)}"


def goals(report: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each goal."""
    results, commands = report["results"], report["commands"]
    for rival, least, modes, of in GOALS:
        rows = [row for row in results if row["way"] == "eager" and rival in row["ratios"]]
        ratios = {(row["name"], row["precision"], row["mode"]): times_as_fast(row["ratios"][rival]) for row in rows}
        keys = [(str(shape), precision, mode) for shape, precision in of for mode in modes]
        facts = {f"{' '.join(key)} {ratios.get(key, 0):.2f}": ratios[key] >= least if key in ratios else None
                 for key in keys}  # fmt: skip
        yield verdict(f"at least {least} times as fast as {rival}", facts)
    yield verdict(
        "the same bits run after run", {f"{row['name']} {row['precision']}": row["same_bits"] for row in results}
    )
    reached = re.findall(r"test accuracy, all \d+ +([\d.]+)%", "".join(each["output"] for each in commands))
    facts = {f"{percent} %": float(percent) >= ACCURACY for percent in reached[:1]}
    yield verdict(f"training reaches {ACCURACY} % of the test images", facts)
    ended = {each["command"]: None if each["status"] is None else each["status"] == 0 for each in commands}
    yield verdict("every command passes", ended)


def main(argv: list[str] | None = None) -> None:
    arguments = parser("gpu", __doc__)
    arguments.add_argument("--rounds", type=positive, default=31, help="interleaved (31)")
    arguments.add_argument("--minutes", type=float, default=7.5, help="after which what is left is dropped (7.5)")
    arguments.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the file")
    options = arguments.parse_args(argv)
    if not torch.cuda.is_available():
        arguments.error("no CUDA device was found")
    end, device = time.monotonic() + 60 * options.minutes, torch.cuda.get_device_name()
    date = datetime.date.today().isoformat()
    path = options.out / f"{machine.slug(device)}-{date}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    head = {"device": device, "date": date, "versions": machine.versions(), "cuda": torch.version.cuda}
    report: dict[str, Any] = {**head, "results": [], "left_out": [], "commands": []}

    def take(commands: Sequence[Sequence[str]], limit: float) -> None:
        limit = max(0.0, min(limit, end - time.monotonic()))
        with ThreadPoolExecutor(max(1, len(commands))) as pool:
            report["commands"] += pool.map(lambda command: run(command, limit), commands)
        write_json(report, path)

    PROCESSES.set_forkserver_preload(["benchmarks.gpu.layers"])
    every = items()
    with PROCESSES.Pool(12) as pool:
        pool.map_async(layers.compile_kernels, every, 1).wait(COMPILE)
    take(CHECKS, TESTS)
    take([TRAIN, HOST], TRAINING)
    for item in every:
        left = end - LAST - time.monotonic()
        late = [layers.described(item) | {"failed": "no time was left"}]
        for row in layer(item, options.rounds, min(LAYER, left)) if left > 0 else late:
            print({key: row[key] for key in row if key not in ("errors", "seconds")}, flush=True)
            report["left_out" if "failed" in row else "results"].append(row)
        write_json(report, path)
    take(SANITIZERS, LAST)
    report["goals"] = list(goals(report))
    print(*report["goals"], write_json(report, path), sep="\n")
    if any(line.startswith("FAIL") for line in report["goals"]):
        sys.exit("a goal is missed; the JSON file has what each part said")


if __name__ == "__main__":
    main()
