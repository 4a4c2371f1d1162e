"""Sizes that the host and the kernels share. They depend on no other module, so that both may import them."""

# The distance in bytes between the counters of two barriers: a cache line of Apple's processors. Others have lines of
# 64 bytes, but may fetch two at once.
LINE = 128
# A K block is a run of the columns over which a product sums. These are the batch rows of a row block, and the bytes of
# packed weights of a K block. Together they stay in a 32 KB L1 cache while the rows' tiles are computed: 16 KB of
# weights, and 8 KB of sums in vectors of 32 bytes.
ROW_BLOCK, WEIGHT_BLOCK_BYTES = 64, 16384
ROOM = 32  # rows after the last one of a row operand, to which whole AMX tiles may write
CHUNKS_IN_SUBTOTAL = 8  # time chunks whose weight gradients the bf16 unit sums, before it adds them to the total
ONE_OFFSET = 1024  # the offset in bytes of the one in the buffer `constants` of `fields`, after its zeros
STRIP = 24  # columns of [x, h, 1] packed side by side: 8 tiles of 3, or 4 of 6
# The most rows for which a single step reads the original weights. It is FEW_TRANSPOSED in the forward pass, which
# transposes the weights anew for each tile of rows, and half of that if rows of weights end inside a vector. It is
# FEW_IN_PLACE in the backward pass, since half of a thread's scratch holds the sums of no more.
FEW_TRANSPOSED, FEW_IN_PLACE = 8, 32


def k_blocks_of(columns):
    """Return the K blocks of 32 columns in an operand of the bf16 unit."""
    return (columns + 31) // 32


def k_blocks_together(components):
    """Return the K blocks of 32 columns whose operands stay in a 48 KB L1 cache while all tiles are multiplied."""
    return max(2, 6 // components)
