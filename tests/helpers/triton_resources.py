"""What the Triton kernels cost, compiled ahead of time: registers, spills, shared memory, instructions of a step.

    python -m tests.helpers.triton_resources > tests/backends/triton/budgets.csv
    python -m tests.helpers.triton_resources CAPABILITY [CASE ...]

The first prints a table of all cases and chips, and the second one JSON object a line. Neither needs a GPU, or may run
under TRITON_INTERPRET=1.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from fastlstm.backends.base import Gradients, Layer, Run
from fastlstm.backends.triton import backward_pass, device, launch, tiles
from fastlstm.backends.triton.cells import cell_functions, means_of
from fastlstm.backends.triton.products import pack_kernel
from fastlstm.cells.spec import by_key

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPERATIONS = {
    "mma": r"\b(?:HMMA|HGMMA|UTC\w*MMA)",
    "streamed": r"\bHGMMA\S* R\d+, gdesc",  # weights that wgmma reads from shared memory
    "barriers": r"\bBAR\.SYNC",
}
T, B = 5, 32
DTYPES = {"bf16": "native", "fp16": "native", "tf32": "tf32", "ieee": "ieee"}


@dataclass(frozen=True)
class Case:
    """direction: forward or backward; kind: bf16, fp16, tf32 or ieee; I 0: the input's product is given."""

    direction: str
    kind: str
    H: int
    I: int = 0
    lengths: bool = False
    reset: bool = False
    save: bool = True
    last_step_only: bool = False
    cells: bool = False  # backward takes a gradient of every state but the first
    cell: str = "lstm"
    heads: int = 1
    many: bool = False  # rows, so that a program takes 16 of them if it can

    def __str__(self) -> str:
        flags = [f"I{self.I}"] * bool(self.I) + ["lengths"] * self.lengths + ["reset"] * self.reset
        flags += ["nothing-saved"] * (not self.save) + ["cells"] * self.cells + ["many"] * self.many
        size = f"H{self.H}" + f"x{self.heads}" * (self.heads > 1)
        parts = [self.direction, self.kind, size, *flags, *["last"] * self.last_step_only]
        return "-".join([*[by_key(self.cell).name] * (self.cell != "lstm"), *parts])


def cases() -> Iterator[Case]:
    """Every kernel in every precision and at the sizes at which a tile changes; masks, other cells, means and heads."""
    for direction in ("forward", "backward"):
        back = direction == "backward"
        of_lstm = [(kind, H) for kind in ("bf16", "tf32", "ieee") for H in (64, 128, 1024)]
        for kind, H in [("bf16", 32), *of_lstm]:
            yield Case(direction, kind, H)
        for kind, H in (("bf16", 40), ("bf16", 100), ("tf32", 40), ("tf32", 100), ("ieee", 40), ("bf16", 1000)):
            yield Case(direction, kind, H, lengths=True, reset=True, cells=back)
        for kind in ("bf16", "tf32"):
            yield Case(direction, kind, 100, lengths=True)
            yield Case(direction, kind, 64, many=True)
            yield Case(direction, kind, 40, lengths=True, reset=True, cells=back, many=True)
        for cell in ("lstm", "gru"):
            yield Case(direction, "bf16", 128, cells=back, many=True, cell=cell)
        of_gru = (("bf16", 64), ("bf16", 128), ("tf32", 128), ("ieee", 64), ("bf16", 1024))
        for kind, H in of_gru:
            yield Case(direction, kind, H, cell="gru")
        yield Case(direction, "bf16", 100, lengths=True, reset=True, cell="gru")
        for cell in ("mgu", "peephole_lstm", "slstm", "layer_norm_lstm", "dreamer_gru"):
            yield Case(direction, "bf16", 128, cell=cell)
        yield Case(direction, "tf32", 64, cell="layer_norm_lstm")
        yield Case(direction, "bf16", 100, lengths=True, reset=True, cell="dreamer_gru")
        for kind in ("bf16", "tf32", "ieee"):
            yield Case(direction, kind, 64, cell="gru_reset_before")
        for cell, kind, H in (("lstm", "bf16", 512), ("slstm", "bf16", 256), ("lstm", "tf32", 1024)):
            yield Case(direction, kind, H, heads=4, cell=cell)
    for I in (16, 28):
        yield Case("forward", "bf16", 128, I=I)
    yield Case("forward", "bf16", 64, I=28, lengths=True, reset=True)
    yield Case("forward", "bf16", 128, save=False)
    yield Case("backward", "bf16", 128, last_step_only=True)


class Compiled(Exception):
    """What a launch would compile: the kernel, and what Triton's compiler takes for these arguments."""


def tile_of(case: Case, capability: tuple[int, int]) -> tiles.Tile:
    """The tile of a case. One of many rows is on a chip of one multiprocessor."""
    cell, precision = by_key(case.cell), DTYPES[case.kind]
    D = case.H if "mean" in means_of(cell) else case.H // case.heads
    gates = cell_functions(cell, precision, D if means_of(cell) or cell.products else 0).gates
    tile = tiles.choose(D, precision, capability, gates, case.I or 40)
    programs, masked = case.H // D, case.lengths or case.reset
    return tiles.with_rows(tile, precision, capability, masked, B, programs, 1 if case.many else 132)


def describe(case: Case, capability: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """The source of the kernel that a call launches, with its arguments as Triton would specialize them, and its
    options.
    """
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiler = make_backend(target)

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel is not pack_kernel:
            binder = jit.create_function_from_signature(kernel.signature, kernel.params, compiler)
            bound, specialization, options = binder(*args, **options)
            found = kernel._pack_args(compiler, options, bound, specialization, options)
            raise Compiled(kernel, *found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit.JITFunction, "run", run)
        patch.setattr(device, "capability", lambda _: capability)
        patch.setattr(device, "multiprocessors", lambda _: 1 if case.many else 132)
        try:
            _call(case)
        except Compiled as found:
            kernel, options, signature, constants, attrs = found.args
            return ASTSource(kernel, signature, constants, attrs), options.__dict__
    raise AssertionError(f"{case} launches nothing")


def _call(case: Case) -> None:
    """A call of the case on tensors that hold anything, of T steps and B rows."""
    I, H, cell, precision = case.I or 40, case.H, by_key(case.cell), DTYPES[case.kind]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.kind, torch.float32)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    of_x, of_h = cell.gates_of_x * H, cell.gates_of_h * H
    weights = [empty(of_x, I), empty(of_h, H // case.heads), empty(of_x), empty(of_h)]
    weights = [a if a.shape[0] else None for a in weights] + [empty(H) for _ in cell.params]
    weights += [empty(H, H // case.heads) for _ in cell.products]
    states, inputs = tuple(empty(B, H) for _ in cell.states), tuple(empty(T, B, H) for _ in cell.inputs)
    lengths = empty(B, dtype=torch.int64) if case.lengths else None
    reset = empty(T, B, dtype=torch.bool) if case.reset else None
    layer = Layer(empty(T, B, I), tuple(weights), states, lengths, reset, False, cell, inputs)
    if case.direction == "forward":
        launch.Forward(layer, case.save, precision).run(layer)
        return
    others = tuple(empty(T, B, H) for _ in cell.states[1:])
    run = Run(empty(T, B, H), states, (*others, empty(T, B, len(cell.layout.saved) * H)))
    dh, douts = (None if case.last_step_only else empty(T, B, H)), others if case.cells else ()
    ends = (states[0], *(None if case.last_step_only else a for a in states[1:]))
    needs = Gradients.of(cell, [a is not None for a in layer.tensors[:-2]])
    backward_pass.Backward(layer, needs, precision).launch(Run(dh, ends, douts), layer, run)


def resources(case: Case, capability: tuple[int, int]) -> dict[str, Any]:
    """The kernel's costs; of instructions those of one warp in one step, or in one K block (stepwise)."""
    source, options = describe(case, capability)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    usage, sass = (dump(flag, compiled.asm["cubin"]) for flag in ("-res-usage", "-sass"))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    loop = main_loop(code)
    return {
        "case": str(case),
        "kernel": "resident" if isinstance(tile_of(case, capability), tiles.Resident) else "stepwise",
        "capability": list(capability),
        "warps": options["num_warps"],
        "registers": registers,
        "spilled": sum(bool(re.search(r"\b(?:LDL|STL)\b", text)) for _, text in code),
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(loop),
        **{name: sum(bool(re.search(pattern, text)) for text in loop) for name, pattern in OPERATIONS.items()},
    }


def dump(flag: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout


def main_loop(code: list[tuple[int, str]]) -> list[str]:
    """The longest stretch with a product of matrices that a backward jump repeats; all there is, where none is left."""
    stretches = []
    for at, text in code:
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at:
            stretches.append([other for place, other in code if int(jump[1], 16) <= place <= at])
    products = [s for s in stretches if re.search(OPERATIONS["mma"], " ".join(s))]
    return max(products, key=len, default=[text for _, text in code])


CHIPS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
COUNTS = ("registers", "spilled", "instructions", "barriers")


def table() -> Iterator[str]:
    """Yield the lines of a table with the `COUNTS` of each case on each chip. The kernels refuse capability 7.5."""
    with ProcessPoolExecutor() as pool:
        columns = [pool.map(resources, cases(), itertools.repeat(_numbers(chip))) for chip in CHIPS]
        yield ",".join(["case", "7.5", *CHIPS])
        for case, *found in zip(cases(), *columns):
            yield ",".join([str(case), "refused", *(" ".join(str(row[name]) for name in COUNTS) for row in found)])


def _numbers(chip: str) -> tuple[int, int]:
    major, minor = map(int, chip.split("."))
    return major, minor


def main() -> None:
    if not sys.argv[1:]:
        for line in table():
            print(line, flush=True)
        return
    capability, names = _numbers(sys.argv[1]), set(sys.argv[2:])
    for case in cases():
        if not names or str(case) in names:
            print(json.dumps(resources(case, capability)), flush=True)


if __name__ == "__main__":
    main()
