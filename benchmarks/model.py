"""How near to the peak of each processor the loops of the Numba backend are, by the model of LLVM's llvm-mca.

python -m benchmarks.model [--llvm-mca PATH] [--osaca PATH] [--loops LOOP ...]

Nothing is timed, and no such processor is needed: the loops are compiled for each of them. The model knows the units
of a processor and how long instructions take, and assumes that all data lies in the L1 cache. So a change of a tile is
seen for all processors at once, but what it predicts is a bound, and not a time. Products have their share of the
multiply-adds that the processor can do, cells their cycles for a vector of units. llvm-mca has to be of LLVM 18 or
newer. It knows no processor of Apple. Their column is there if OSACA is installed (`pip install osaca`).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.shared.tables import parser, table


class Processor(NamedTuple):
    """A processor of the model: LLVM's names, its multiply-adds of a vector in a cycle, and their instruction."""

    triple: str
    cpu: str
    features: str
    peak: int
    multiply_add: str


ARM, X86 = "aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"
PROCESSORS = {
    "Neoverse N1": Processor(ARM, "neoverse-n1", "+neon", 2, "fmla"),
    "Neoverse V1": Processor(ARM, "neoverse-v1", "+neon", 4, "fmla"),
    "Neoverse V2": Processor(ARM, "neoverse-v2", "+neon", 4, "fmla"),
    "Apple M1": Processor(ARM, "apple-m1", "+neon", 4, "fmla"),
    "Zen 4": Processor(X86, "znver4", "+avx512f,+avx2,+fma", 1, "vfmadd"),
    "Haswell": Processor(X86, "haswell", "+avx2,+fma", 2, "vfmadd"),
}
VECTORS = (4, 3, 2, 1)
LOOPS = {  # by the title of a row, the module of functions and the function
    **{f"tile of {n}": ("primitives", f"tile{n}x") for n in VECTORS},
    **{f"gradients, {n}": ("primitives", f"accumulate{n}x") for n in VECTORS},
    **{f"one row, {n}": ("primitives", f"gemv{n}") for n in VECTORS},
    "heads": ("primitives", "masked"),
    **{
        f"{cell}, {function.replace('_', ' ')}": (cell, f"cell_{function}")
        for cell in ("LSTM", "GRU")
        for function in ("forward", "forward_saving", "backward")
    },
}


def assembly(features: str, target: tuple[str, str], *modules: str) -> list[str]:
    """Return the modules of functions for float32 as the assembly of a processor, compiled by a process of its own.

    Args:
        features: the processor's features, which decide the width of vectors when the kernels are imported.
        target: LLVM's names of the system and the processor.
        modules: "primitives", "LSTM" or "GRU" for a cell, or "matrix1" to "matrix3" for the bf16 unit.
    """
    environment = {**os.environ, "NUMBA_CPU_FEATURES": features, "NUMBA_CPU_NAME": target[1]}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "benchmarks.model", "--compile", *target, features, *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.split(chr(0))[:-1]


def print_assembly(triple: str, cpu: str, features: str, *modules: str) -> None:
    """Print what `assembly` returns. The environment of this process names the processor."""
    import llvmlite.binding as llvm  # not above: numba reads the environment once
    from llvmlite import ir
    from numba.core import types

    from fastlstm import cells
    from fastlstm.backends.numba.llvm import cells as cell_functions
    from fastlstm.backends.numba.llvm import loops, matrix, primitives
    from fastlstm.backends.numba.llvm.simd import VectorType

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    float32 = VectorType(types.float32)
    for name in modules:
        if name == "primitives":
            builders = primitives.builders(float32)
        elif name.startswith("matrix"):
            builders = matrix.builders(int(name[-1]))
        else:
            functions = cell_functions.functions_of({"LSTM": cells.lstm, "GRU": cells.gru}[name])
            builders = cell_functions.builders(float32, functions)
        module = ir.Module(name)
        module.triple = triple
        for function, (arguments, builder) in builders.items():
            loops.function_named(module, function, arguments, builder).linkage = "external"
        machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=3)
        parsed = llvm.parse_assembly(str(module))
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        passes.getModulePassManager().run(parsed, passes)
        print(machine.emit_assembly(parsed), end=chr(0))


def busiest_loop(code: str, function: str, multiply_add: str) -> list[str]:
    """Return the instructions of the innermost loop of a function that holds most multiply-adds, and its label."""
    body = code.split(f"\n{function}:", 1)[1].split("\n.Lfunc_end", 1)[0].splitlines()
    labels, best = {}, []
    for n, line in enumerate(body):
        words = line.split()
        if line and not line[0].isspace() and words[0].endswith(":"):
            labels[words[0][:-1]] = n
        elif words and words[-1] in labels and words[0].startswith(("j", "b")):
            loop = [text.strip() for text in body[labels[words[-1]] : n + 1]]
            inner = not any(text.startswith(".L") and text.endswith(":") for text in loop[1:])
            if inner and sum(multiply_add in text for text in loop) > sum(multiply_add in text for text in best):
                best = loop
    return best


def highest_tile(code: str, name: str) -> str:
    """Return the function of this name, or that of its tile with most rows."""
    found: list[str] = re.findall(rf"^({name}\d*):", code, re.MULTILINE)
    return max(found, key=lambda each: int("0" + each[len(name) :]))


def cycles_by_osaca(osaca: str, loop: list[str]) -> float:
    """Return how many cycles a round of a loop takes on an M1: those of its busiest unit, or of its longest chain from
    round to round. Instructions that OSACA does not know take no time.
    """
    with tempfile.TemporaryDirectory() as folder:
        code, result = Path(folder, "loop.s"), Path(folder, "loop.yaml")
        code.write_text("\n".join(loop) + "\n")
        command = [osaca, "--arch", "M1", "--ignore-unknown", "--yaml-out", result, code]
        subprocess.run(command, capture_output=True, check=True)
        summary = result.read_text().rpartition("Summary:")[2]
    units = re.findall(r":\s+(-?[\d.]+)", summary.partition("PortPressure: {")[2].partition("}")[0])
    return max(map(float, [*units, *re.findall(r"LCD:\s+([\d.]+)", summary)]))


def cycles(llvm_mca: str, osaca: str, processor: Processor, loop: list[str]) -> float:
    """Return how many cycles a round of a loop takes once it runs evenly."""
    if processor.cpu == "apple-m1":
        return cycles_by_osaca(osaca, loop)
    totals = []
    for rounds in (100, 300):
        command = [llvm_mca, f"-mtriple={processor.triple}", f"-mcpu={processor.cpu}", f"-iterations={rounds}"]
        done = subprocess.run(command, input="\n".join(loop) + "\n", capture_output=True, text=True, check=True)
        totals.append(int(re.findall(r"Total Cycles:\s+(\d+)", done.stdout)[0]))
    return (totals[1] - totals[0]) / 200


def column(llvm_mca: str, osaca: str, processor: Processor, wanted: list[str]) -> list[str]:
    """Return what the model says of the wanted loops on a processor."""
    modules, entries = ("primitives", "LSTM", "GRU"), []
    codes = dict(zip(modules, assembly(processor.features, (processor.triple, processor.cpu), *modules)))
    for module, name in (LOOPS[title] for title in wanted):
        if module == "primitives":
            function, instruction = highest_tile(codes[module], name), processor.multiply_add
        else:
            function, instruction = name, "mul" if name == "cell_backward" else "div"
        loop = busiest_loop(codes[module], function, instruction)
        taken = cycles(llvm_mca, osaca, processor, loop)
        if module == "primitives":
            share = sum(instruction in line for line in loop) / processor.peak / taken
            rows = f" ({re.findall('x([0-9]+)$', function)[0]} rows)" if name.endswith("x") else ""
            entries.append(f"{share:.2f}{rows}")
        else:
            entries.append(f"{taken:.0f}")
    return entries


def version(llvm_mca: str) -> int:
    """Return the version of LLVM that llvm-mca belongs to."""
    text = subprocess.run([llvm_mca, "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"LLVM version (\d+)", text)[0])


def main(options: argparse.Namespace) -> None:
    path = shutil.which(options.llvm_mca)
    if path is None or version(path) < 18:
        reason = "was not found" if path is None else "is too old"
        sys.exit(f"{options.llvm_mca} {reason}: name one of LLVM 18 or newer")
    wanted = [title for title in LOOPS if title in (options.loops or LOOPS)]
    osaca = shutil.which(options.osaca)
    processors = {name: each for name, each in PROCESSORS.items() if osaca or each.cpu != "apple-m1"}
    columns = [column(path, osaca or "", processor, wanted) for processor in processors.values()]
    print(*table(["loop", *processors], ([title, *row] for title, row in zip(wanted, zip(*columns)))), sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        print_assembly(*sys.argv[2:])
    else:
        options = parser("model", __doc__)
        options.add_argument("--llvm-mca", default="llvm-mca", metavar="PATH", help="the program (llvm-mca)")
        options.add_argument("--osaca", default="osaca", metavar="PATH", help="the program (osaca)")
        options.add_argument("--loops", nargs="+", choices=LOOPS, metavar="LOOP", help="of the table (all)")
        main(options.parse_args())
