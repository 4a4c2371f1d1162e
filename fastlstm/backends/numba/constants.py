"""Sizes that the host and the kernels share. They depend on no other module, so that both may import them."""

LINE = 64  # bytes of a cache line: the counters of two barriers lie so far apart
# Batch rows that pass a panel together. With the packed weights of a block they stay in a 32 KB L1 cache while the
# rows' tiles are computed: 16 KB of weights, and 8 KB of sums in vectors of 32 bytes.
ROW_BLOCK, WEIGHT_BLOCK_BYTES = 64, 16384
BLOCK_STEPS = 2  # steps of k whose operands stay in a 48 KB L1 cache while all their tiles are multiplied: 24 + 12 KB
FOLD = 8  # chunks of steps that the matrix unit sums together
ONE_OFFSET = 1024  # where the constants' one lies, after the zeros
STRIP = 24  # columns of [x, h, 1] packed side by side: 8 tiles of 3, or 4 of 6
# The most rows for which a step reads the weights unpacked: in the forward pass, which transposes them for each tile of
# rows, and in the backward pass, for whose sums half of a thread's scratch has room.
FEW_TRANSPOSED, FEW_IN_PLACE = 8, 32


def operand_steps(I, H):
    """Return the steps of 32 columns that x and h make for the matrix unit, each padded to 16."""
    return ((I + 15) // 16 + (H + 15) // 16 + 1) // 2
