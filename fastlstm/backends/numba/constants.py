"""Sizes that the host and the kernels share. They depend on no other module, so that both may import them."""

LINE = 64  # bytes of a cache line, and the distance between the counters of two barriers
# Batch rows of a row block, and bytes of packed weights of a K block. Together they stay in a 32 KB L1 cache while the
# rows' tiles are computed: 16 KB of weights, and 8 KB of sums in vectors of 32 bytes.
ROW_BLOCK, WEIGHT_BLOCK_BYTES = 64, 16384
BLOCK_STEPS = 2  # K blocks whose operands stay in a 48 KB L1 cache while all AMX tiles are multiplied: 24 + 12 KB
FOLD = 8  # time chunks that the bf16 unit sums together
ONE_OFFSET = 1024  # the offset of the constants' one, after the zeros
STRIP = 24  # columns of [x, h, 1] packed side by side: 8 tiles of 3, or 4 of 6
# The most rows for which a step reads the original weights: in the forward pass, which transposes them for each tile of
# rows, and in the backward pass, for whose sums half of a thread's scratch has room.
FEW_TRANSPOSED, FEW_IN_PLACE = 8, 32


def operand_steps(I, H):
    """Return the K blocks of 32 columns in a row operand of x and h, each of which is padded to 16 columns."""
    return ((I + 15) // 16 + (H + 15) // 16 + 1) // 2
