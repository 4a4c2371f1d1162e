"""Matrix instructions of four warps.

PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from tests.ptx.emulator.matrix import a_places, accumulator, elements, fragment, put_accumulator
from tests.ptx.emulator.operands import Active, Run, Unsupported, decode, source
from tests.ptx.emulator.parse import Instruction
from tests.ptx.emulator.shared import BASE


def build(ins: Instruction, n: int) -> Run:
    if ins.parts[1] == "fence":
        return lambda m, active: m.products.fence()
    if ins.parts[1] == "commit_group":
        return lambda m, active: m.products.commit(active)
    if ins.parts[1] == "wait_group":
        left = int(ins.operands[0].text)
        return lambda m, active: m.products.wait(left, active, m.finish_product)
    return _mma_async(ins, n)


def fence(ins: Instruction, n: int) -> Run:
    """The fence between the generic and the async proxy."""
    if not ins.opcode.startswith("fence.proxy.async"):
        raise Unsupported(ins.text)

    def run(m: Any, active: Active) -> None:
        m.clock.proxy_fences += 1

    return run


def _mma_async(ins: Instruction, n: int) -> Run:
    """D (64, N) of four warps with 16 rows each. A lies in registers as in mma.sync or in shared memory, B there."""
    found = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3", ins.opcode)
    if not found or n % 128:
        raise Unsupported(ins.text)
    N, K, kind = int(found[1]), int(found[2]), found[3]
    D, A, B, scale_d, *immediates = ins.operands
    imm_scale_a, imm_scale_b, *transposed = (int(one.text) for one in immediates)
    *imm_trans_a, imm_trans_b = transposed or (0, 0)  # tf32 has no choice
    if (imm_scale_a, imm_scale_b) != (1, 1) or len(D) != N // 2:
        raise Unsupported(ins.text)
    a_row, a_column = a_places(4, 1 if kind == "tf32" else 2)
    b_desc, a_desc = source(B, "u64", n), None if isinstance(A, list) else source(A, "u64", n)
    accumulates = source(scale_d, "pred", n)

    def run(m: Any, active: Active) -> None:
        m.whole_cta(active)
        if a_desc is None:
            a = np.empty((n // 32, 16, K), np.float32)
            a[:, a_row, a_column] = fragment(m, A, kind)
        else:
            a = _tiles(m, a_desc, 64, K, imm_trans_a[0], kind).reshape(n // 32, 16, K)
        b = _tiles(m, b_desc, N, K, imm_trans_b, kind).swapaxes(-1, -2).repeat(4, 0)
        into = accumulates(m).reshape(-1, 128)
        if (into != into[:, :1]).any():
            m.clock.report("divergent operand", "scale-d")
        given = accumulator(m, D)
        C = np.where(into.reshape(-1, 32)[:, :1, None], given, np.float32(0))
        put_accumulator(m, D, C + a @ b)
        m.products.started(D, A if a_desc is None else [], not given.view(np.uint32).any())

    return run


def _tiles(m: Any, desc: Callable[[Any], np.ndarray], lines: int, K: int, transposed: int, kind: str) -> np.ndarray:
    """(warpgroups, lines, K) float32 that each warpgroup's descriptor names."""
    given, size = desc(m).reshape(-1, 128), 32 // K
    if (given != given[:, :1]).any():
        m.clock.report("divergent operand", "descriptor")
    tiles = []
    for group, word in enumerate(given[:, 0]):
        offset = matrix_offsets(int(word), lines, bool(transposed), size).ravel() - BASE
        thread = m.threads[128 * group : 128 * (group + 1)]
        if (offset < 0).any() or (offset + size > m.shared.data.size).any():
            m.clock.report("out of bounds", f"wgmma reads shared bytes to {offset.max()} of {m.shared.data.size}")
            offset = np.clip(offset, 0, m.shared.data.size - size)
        m.products.add((m.shared.start_stream(offset, size, thread), thread))
        bits = m.shared.data[offset[:, None] + np.arange(size)].view(np.uint32 if size == 4 else np.uint16)
        numbers = elements(bits, kind) if size == 4 else decode(bits, kind).astype(np.float32)
        tiles.append(numbers.reshape(lines, K))
    return np.stack(tiles)


# "Matrix Descriptor Format": the first bit and the number of bits of each field
FIELDS = {
    "start_address": (0, 14), "leading_dimension_byte_offset": (16, 14), "stride_dimension_byte_offset": (32, 14),
    "matrix_base_offset": (49, 3), "swizzle_mode": (62, 2),
}  # fmt: skip
CHUNKS = {0: 1, 1: 8, 2: 4, 3: 2}  # 16-byte chunks that a swizzle mode permutes: none, 128, 64 and 32 bytes


def descriptor_field(descriptor: int, name: str) -> int:
    first, bits = FIELDS[name]
    return descriptor >> first & ((1 << bits) - 1)


@lru_cache(1024)
def matrix_offsets(descriptor: int, lines: int, transposed: bool, size: int = 2) -> np.ndarray:
    """(lines, 32 / size): the byte address of each element of `size` bytes of a K-major operand. A transposed one is
    MN-major.

    From "Shared Memory Matrix Layout", "Strides" and "Swizzling Modes". Addresses and offsets are in units of 16 bytes.
    A swizzle of w chunks xors the last bits of a chunk's number with the address bits from 7 on.
    """
    start, leading, stride = (descriptor_field(descriptor, name) << 4 for name in list(FIELDS)[:3])
    swizzle = descriptor_field(descriptor, "swizzle_mode")
    if descriptor_field(descriptor, "matrix_base_offset") and swizzle:  # without a swizzle it has no meaning
        raise Unsupported("a descriptor with a base offset")
    chunks, T = CHUNKS[swizzle], 16 // size  # T elements of a chunk
    line, k = np.arange(lines)[:, None], np.arange(32 // size)
    if not transposed and chunks == 1:
        offset = line % 8 * 16 + line // 8 * stride + k % T * size + k // T * leading
    elif not transposed:  # rows of 16 * chunks bytes, in groups of 8
        offset = line % 8 * 16 * chunks + line // 8 * stride + k * size
    elif chunks == 1:
        offset = line % T * size + line // T * stride + k % 8 * 16 + k // 8 * leading
    else:
        wide = T * chunks  # lines in a row
        offset = line % wide * size + line // wide * leading + k % 8 * 16 * chunks + k // 8 * stride
    address = start + offset
    return address ^ ((address >> 7 & (chunks - 1)) << 4)
