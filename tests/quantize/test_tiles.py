"""The int8 tiles as assembly, for processors that this one need not be."""

import pytest

from tests.helpers.numba import busiest_loop, run

CODE = """
    import llvmlite.binding as llvm
    from llvmlite import ir
    from fastlstm import cells
    from fastlstm.backends.numba.llvm import bytes, loops, quantized
    from fastlstm.backends.numba.llvm.cells import functions_of
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module("primitives")
    module.triple = {triple!r}
    for name, (arguments, builder) in quantized.builders("int8", functions_of(cells.lstm), {pieces}).items():
        loops.function(module, name, arguments, builder).linkage = "external"
    machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu={cpu!r}, features={features!r}, opt=3)
    parsed = llvm.parse_assembly(str(module))
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    print(bytes.UNIT, bytes.tile_rows({pieces}))
    print(machine.emit_assembly(parsed))
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize(
    ("features", "triple", "cpu", "unit", "instruction"),
    [
        ("+avx512f,+avx512bw,+avx512vnni,+avx2,+fma", "x86_64-unknown-linux-gnu", "icelake-server", "vnni", "vpdpbusd"),
        ("+avx2,+fma,+avxvnni", "x86_64-unknown-linux-gnu", "alderlake", "avxvnni", "vpdpbusd"),
        ("+avx2,+fma", "x86_64-unknown-linux-gnu", "haswell", "avx2", "vpmaddubsw"),
        ("+neon,+dotprod", "aarch64-unknown-linux-gnu", "neoverse-n1", "dotprod", "sdot"),
    ],
    ids=["vnni", "avxvnni", "avx2", "neon"],
)
def test_the_tiles_stay_in_registers(features, triple, cpu, unit, instruction, pieces):
    """The inner loops of the highest tile and of a lone row's have all their products, and touch no stack."""
    code = CODE.format(features=features, triple=triple, cpu=cpu, pieces=pieces)
    head, text = run(code, NUMBA_CPU_FEATURES=features, NUMBA_CPU_NAME=cpu).split("\n", 1)
    name, rows = head.split()
    assert name == unit
    for tile, height in ((f"int8.inputs{rows}", int(rows)), (f"int8.step{rows}", int(rows)), ("step", 1)):
        loop = busiest_loop(text, tile, instruction)
        products = sum(instruction in line for line in loop)
        assert products >= height * pieces * 4
        assert products % (height * pieces * 4) == 0
        assert not [line for line in loop if "rsp" in line or "[sp" in line]


def test_the_matrix_unit_multiplies_whole_tiles():
    """Where a processor has AMX for bytes, sums over 64 columns are its, in a loop that touches no stack."""
    features = "+avx512f,+avx512bw,+avx512vnni,+avx512bf16,+avx2,+fma,+amx-tile,+amx-int8,+amx-bf16"
    cpu = "sapphirerapids"
    code = CODE.format(features=features, triple="x86_64-unknown-linux-gnu", cpu=cpu, pieces=1)
    text = run(code, NUMBA_CPU_FEATURES=features, NUMBA_CPU_NAME=cpu)
    loop = busiest_loop(text, "int8.unit4", "tdpbusd")
    products, loads = (sum(name in line for line in loop) for name in ("tdpbusd", "tileloadd"))
    assert products >= 4
    assert 4 * loads == 5 * products  # of a tile of rows and four of weights
    assert not [line for line in loop if "rsp" in line]
