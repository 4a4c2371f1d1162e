"""How each layer is cut up, by hidden size, precision and chip."""

from dataclasses import dataclass


# Kilobytes of shared memory that a program may have, by compute capability; 99 elsewhere (8.6, 8.9, 12.0)
SHARED_KB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
INPUT_PRECISION = {"native": "ieee", "tf32": "tf32", "ieee": "tf32x3"}  # of tl.dot; ieee would go past the matrix unit


@dataclass(frozen=True)
class Resident:
    """One launch. H padded to P; batch rows of a program, and warps in forward and backward."""

    P: int
    block_b: int
    forward_warps: int
    backward_warps: int


@dataclass(frozen=True)
class Stepwise:
    """A launch a step: units and batch rows of a program, terms of the sum taken at once."""

    units: int
    block_b: int
    block_k: int
    warps: int
    stages: int

    def grid(self, H: int, rows: int, groups: int) -> tuple[int, int, int]:
        return -(-H // self.units), -(-rows // self.block_b), groups


def choose(H: int, precision: str, capability: tuple[int, int]) -> Resident | Stepwise:
    P = max(32, 1 << (H - 1).bit_length())
    if P <= (64 if precision == "ieee" else 128) and 8 * P * P <= SHARED_KB.get(capability, 99) * 1024:
        return Resident(P, 8, max(4, P // 8), max(4, P // 16))
    return Stepwise(32, 32, 32 if precision != "native" else 64, 4, 3)


def padded_input(I: int, precision: str) -> int:
    return 0 if I > 32 or precision != "native" else max(16, 1 << (I - 1).bit_length())
