"""The tile of each layer, by hidden size, precision and chip, and whether `auto` takes it.

A chip is a compute capability. docs/notes/gpu.md has the registers, spills and instructions that the choices rest on.
"""

from dataclasses import dataclass, replace
from functools import cache

# Kilobytes of shared memory that a program may have, by compute capability; 99 elsewhere (8.6, 8.9, 12.0)
SHARED_KB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
INPUT_PRECISION = {"native": "ieee", "tf32": "tf32", "ieee": "tf32x3"}  # of tl.dot; ieee would go past the matrix unit
STEP_OF_16_ROWS = 1.4  # the time of a step of 16 batch rows in that of one of 8, by compiled instructions and barriers


@dataclass(frozen=True)
class Resident:
    """The tile of a kernel that runs all steps in one launch.

    Attributes:
        P, inputs: H, and I where the kernel also multiplies x, or 0, padded to powers of two.
        block_b, forward_warps, backward_warps: batch rows and warps of a program.
        forward_gates, backward_gates: how many gates are one product, at most.
    """

    P: int
    block_b: int
    forward_warps: int
    backward_warps: int
    forward_gates: int = 4
    backward_gates: int = 4
    inputs: int = 0


@dataclass(frozen=True)
class Stepwise:
    """The tile of a kernel of one launch a step: units, rows and warps of a program, and the length of a K block."""

    units: int
    block_b: int
    block_k: int
    forward_warps: int
    backward_warps: int
    stages: int


Tile = Resident | Stepwise


@cache  # a short call would notice the time
def choose(H: int, precision: str, capability: tuple[int, int], gates: int = 4, I: int = 0) -> Tile:
    """Return the tile of a layer.

    Resident: 4 P^2 weights of two bytes lie in registers, 128 KB at P 128, half of a multiprocessor's 256 KB, after
    they passed through shared memory once. Read from there in each step they would take 1024 cycles at 128 bytes a
    cycle. 8 rows are the matrix unit's smallest N: more programs for the same batch.

    * Where shared memory has no room for the weights of all gates, a product computes two gates.
    * Warps forward: P / 4, a thread for each unit of each row, since then memory's layout is nearly the product's: that
      takes a third of the barriers of P / 8. At P 128, 8 warps: 255 registers a thread, 128 for weights; 16 spill with
      wgmma. Capability 10 and products of two gates take mma.sync with 16 warps, and spill with 8. At P 32 capability
      10 does best with 4. A warp takes 16 rows of a product: more than rows / 16 would compute the same twice.
    * Warps backward: P / 16. More only add instructions. On capability 8 each gate has a product of its own in 16 bits
      above P 32: 8 to 15 % fewer instructions, and no bank of shared memory read twice by a warp. On capability 12 it
      spills least at P 128.
    * ieee also holds the low parts, which wgmma reads from shared memory: at P 128 it spills with any number of warps.

    Stepwise: 4 x 32 rows of weights by 32 batch rows: a step of H 1024 and B 128 is 128 programs, one for each
    multiprocessor, and no precision spills; on capability 10 that takes 8 warps. In backward 32 units are half of
    wgmma's M, and take mma.sync. In ieee each of two warps takes 16 units; four would compute all twice.

    `precision`: native (16 bits), tf32 or ieee. `gates`: how many of them a product computes if there is room. `I`: 0
    where no x is multiplied.
    """
    P, newest = max(32, 1 << (H - 1).bit_length()), capability[0] >= 10
    if P > 128 or (P > 64 and precision == "ieee"):
        warps = 8 if newest else 4
        backward_warps = 2 if precision == "ieee" and not newest else warps
        return Stepwise(32, 32, 64 if precision == "native" else 32, warps, backward_warps, 3)
    joint = 4 if _fits(8 * P * P, capability) else 2
    forward = {32: 4 if newest else 8, 64: 16, 128: 16 if newest or joint == 2 else 8}
    warps = forward[P] if gates == 4 else min(gates * P // 16, 8)
    apart = (capability[0] == 8 and precision == "native" and P > 32) or (newest and joint == 2)
    return Resident(P, 8, warps, P // 16, joint, 1 if apart else joint, padded_input(I, P, precision, capability))


def holds_products(tile: Tile, weights: int) -> bool:
    """Return whether a program has registers for so many (P, P) weights: at four warps 64 KB, 16 bits at P 64."""
    return isinstance(tile, Resident) and tile.P <= 64 and weights <= 8


def padded_input(I: int, P: int, precision: str, capability: tuple[int, int]) -> int:
    """Return I padded, where the resident kernel also does the input's product, or 0 where a GEMM does: in 16 bits, up
    to 32 inputs, whose weights take 32 more registers at P 128, and if shared memory has room for both weights, since
    Triton 3.8 puts them there at once.
    """
    if not 0 < I <= 32 or precision != "native":
        return 0
    padded = max(16, 1 << (I - 1).bit_length())
    return padded if _fits(8 * P * (P + padded), capability) else 0


def _fits(weights: int, capability: tuple[int, int]) -> bool:
    """Return whether shared memory has room for so many bytes of weights and the layouts' conversions."""
    return SHARED_KB.get(capability, 99) * 1024 >= weights + 8192


def with_rows(
    tile: Tile, precision: str, capability: tuple[int, int], masked: bool, rows: int, programs_per_block: int,
    multiprocessors: int,
) -> Tile:  # fmt: skip
    """Return the tile with as many batch rows a program, 8 or 16, as take the least time, by waves: a program on each
    multiprocessor, whose schedulers limit those that share it. 16 rows take `STEP_OF_16_ROWS` times as long as 8. They
    spill in ieee, and at P 128 in tf32, with masks, and on chips whose forward pass has 16 warps.

    Args:
        masked: whether there are lengths or resets.
        rows: the batch rows of each layer of a stack.
        programs_per_block: how many take a block of rows: one for each head, in each layer of the stack.
    """
    if not isinstance(tile, Resident) or precision == "ieee":
        return tile
    if tile.P == 128 and (precision == "tf32" or masked or tile.forward_gates < 4 or capability[0] >= 10):
        return tile
    waves_of_8, waves_of_16 = (-(-(-(-rows // block) * programs_per_block) // multiprocessors) for block in (8, 16))
    return replace(tile, block_b=16) if waves_of_8 > STEP_OF_16_ROWS * waves_of_16 else tile


def is_faster(tile: Tile) -> bool:
    """Return whether `auto` takes the kernels for a layer that torch's own layer computes as well: resident ones.

    No GPU has been measured, so this is counted. A launch takes 2.5 us of Python and about 2.5 us of CUDA, and stepwise
    kernels are a launch a step: 5 us. cuDNN's steps take 2 us by published figures (B 16, H 768).
    """
    return isinstance(tile, Resident)
