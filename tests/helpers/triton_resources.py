"""What the Triton kernels cost, compiled ahead of time: registers, spills, shared memory, instructions of a step.

    python -m tests.helpers.triton_resources CAPABILITY [CASE ...]

prints one JSON object a line. It needs no GPU, and must not run under TRITON_INTERPRET=1.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlstm.backends.triton import resident, stepwise, tiles

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
OPERATIONS = {
    "mma": r"\b(?:HMMA|HGMMA|UTC\w*MMA)",
    "wgmma": r"\bHGMMA",
    "streamed": r"\bHGMMA\S* R\d+, gdesc",  # weights that wgmma reads from shared memory
    "special": r"\bMUFU",
    "shared": r"\b(?:LDS|STS|LDSM|STSM)\b",
    "barriers": r"\bBAR\.SYNC",
    "global": r"\b(?:LDG|STG)",
}
PTX = {  # of the whole kernel
    "wgmma": r"\bwgmma\.mma_async",
    "mma.sync": r"\bmma\.sync",
    "tcgen05.mma": r"\btcgen05\.mma",
    "tanh.approx": r"\btanh\.approx",
    "ex2.approx": r"\bex2\.approx",
    "div": r"\bdiv\.\w+\.f32",
    "cp.async": r"\bcp\.async\.c[ag]",  # loads on their way while something else is done
}
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
    cells: bool = False  # backward takes a gradient of every cell state

    def __str__(self) -> str:
        flags = [f"I{self.I}"] * bool(self.I) + ["lengths"] * self.lengths + ["reset"] * self.reset
        flags += ["nothing-saved"] * (not self.save) + ["cells"] * self.cells
        return "-".join([self.direction, self.kind, f"H{self.H}", *flags, *["last"] * self.last_step_only])


def cases() -> Iterator[Case]:
    """Every kernel in every precision, the sizes at which a tile changes, and the variants that cost registers."""
    for kind in DTYPES:
        for direction in ("forward", "backward"):
            for H in (32, 64, 100, 128, 1024):
                yield Case(direction, kind, H)
            for H in (40, 64, 100, 128, 1024):
                yield Case(direction, kind, H, lengths=True, cells=direction == "backward")
    for H in (64, 100, 128):
        yield Case("forward", "bf16", H, I=28)
        yield Case("forward", "bf16", H, I=28, lengths=True)
    for kind, H in (("bf16", 128), ("bf16", 1024), ("tf32", 100), ("ieee", 40), ("ieee", 64)):
        for lengths in (False, True):
            yield Case("forward", kind, H, lengths=lengths, reset=True)
            yield Case("backward", kind, H, lengths=lengths, reset=True, cells=True)
    yield Case("forward", "bf16", 100, I=28, lengths=True, reset=True)
    yield Case("forward", "bf16", 128, I=16)
    yield Case("forward", "bf16", 128, save=False)
    yield Case("backward", "bf16", 128, last_step_only=True)


def describe(case: Case, capability: tuple[int, int]) -> tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]:
    """The kernel, the types of its arguments, its constants and its options, as `launch` would choose them."""
    precision = DTYPES[case.kind]
    dtype = "fp32" if precision != "native" else case.kind
    tile = tiles.choose(case.H, precision, capability)
    module = resident if isinstance(tile, tiles.Resident) else stepwise
    kernel = getattr(module, f"{case.direction}_kernel")
    types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    types |= {name: "i64" for name in types if name.endswith("_step")}
    types |= {"lengths_ptr": "*i64", "reset_ptr": "*i1"} | {
        name: "*fp32" for name in types if "carried" in name or name == "scale_ptr"
    }
    absent = {"lengths_ptr"} if not case.lengths else set()
    absent |= {"reset_ptr"} if not case.reset else set()
    constants: dict[str, Any] = {"H": case.H, "BLOCK_B": tile.block_b}
    if module is resident:
        options = {"num_warps": getattr(tile, f"{case.direction}_warps"), "num_stages": 1}
        PI = tiles.padded_input(case.I, tile.P, precision, capability) if case.I else 0
        constants |= {"P": tile.P, "I": case.I if PI else 0, "PI": PI, "PRECISION": precision}
        packed = ("weight_ptr", "weight_low_ptr")
        types |= dict.fromkeys(packed, "*fp16") if precision != "native" else {}
        absent |= {"weight_low_ptr", "scale_ptr"} if precision == "native" else set()
        absent |= set() if PI else {"weight_ih_ptr", "bias_ptr"}
    else:
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        constants |= {"UNITS": tile.units, "BLOCK_K": tile.block_k, "PRECISION": tiles.INPUT_PRECISION[precision]}
    absent |= {"h_n_ptr"} if module is stepwise and not case.lengths else set()
    absent |= {"c_ptr", "gates_ptr"} if not case.save else set()
    absent |= {"dc_ptr"} if not case.cells else set()
    absent |= {"dh_ptr", "dc_n_ptr"} if case.last_step_only else set()
    constants |= dict.fromkeys(absent)
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    return kernel, types, constants, options | {"enable_fp_fusion": True}


def resources(case: Case, capability: tuple[int, int]) -> dict[str, Any]:
    """The kernel's costs; of instructions those of one warp in one step (resident) or one K block (stepwise).

    Of PTX those of the whole kernel.
    """
    kernel, types, constants, options = describe(case, capability)
    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    usage, sass = (dump(flag, compiled.asm["cubin"]) for flag in ("-res-usage", "-sass"))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)]
    loop = main_loop(code)
    return {
        "case": str(case),
        "kernel": "stepwise" if "UNITS" in constants else "resident",
        "capability": list(capability),
        "warps": options["num_warps"],
        "registers": registers,
        "spilled": sum(bool(re.search(r"\b(?:LDL|STL)\b", text)) for _, text in code),
        "shared_bytes": compiled.metadata.shared,
        "instructions": len(loop),
        **{name: sum(bool(re.search(pattern, text)) for text in loop) for name, pattern in OPERATIONS.items()},
        "ptx": {name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in PTX.items()},
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


def main() -> None:
    names = set(sys.argv[2:])
    capability = tuple(map(int, sys.argv[1].split(".")))
    for case in cases():
        if not names or str(case) in names:
            print(json.dumps(resources(case, capability)), flush=True)


if __name__ == "__main__":
    main()
