"""What is kept of weights beside their packed form: biases, and digests, by which a change of them is seen."""

from fastlstm.backends.numba.kernels.layout import block_hh, block_ih, first_h_preact, gate_at
from fastlstm.backends.numba.kernels.shared import jit
from fastlstm.backends.numba.llvm.digest import DIGEST_BYTES
from fastlstm.backends.numba.llvm.intrinsics import call

DIGEST = 1 << 14  # words of a block of weights that has one digest: 64 KB


@jit
def pack_biases(a, p, to):
    """The sum of the biases of panel p to [gate][lane], or its gates side by side (see `is_compact`), then zeros."""
    L, S, H = a.lanes, a.size, a.H
    valid = min(L, H - p * L)
    call(a.copy_rows, 1, 0, a.sums * L, to, 0, to, 0)
    if a.bias != 0:
        for k in range(a.of_x):
            call(a.copy_rows, 1, valid, valid, a.bias + (block_ih(a, k) * H + p * L) * S, 0, to + gate_at(a, p, k), 0)
    if a.bias_hh != 0:
        for k in range(a.of_h):
            at = to + gate_at(a, p, first_h_preact(a) + k)
            call(a.add_rows, 1, valid, a.bias_hh + (block_hh(a, k) * H + p * L) * S, 0, at, 0)


@jit
def digest_weights(a, thread, threads, recurs):
    """`digest_words` of the weights and biases that the packed ones are of: of weight_hh if the layer `recurs`."""
    S, I, H = a.original_size, a.I, a.H
    of_bias, of_bias_hh = a.of_x if a.original_bias != 0 else 0, a.of_h if a.original_bias_hh != 0 else 0
    n = digest_words(a, a.original_ih, a.of_x * H * I * S // 4, 0, thread, threads)
    n = digest_words(a, a.original_bias, of_bias * H * S // 4, n, thread, threads)
    n = digest_words(a, a.original_bias_hh, of_bias_hh * H * S // 4, n, thread, threads)
    digest_words(a, a.original_hh, a.of_h * H * a.head * S // 4 if recurs else 0, n, thread, threads)


@jit
def digest_words(a, source, words, n, thread, threads):
    """Digest this thread's blocks of so many words to `digests`, or compare them with what is there. Threads take turns
    with the blocks. The first block has the number n. Return the number that comes after the last.
    """
    for k in range(0, words, DIGEST):
        if n % threads == thread:
            call(a.digest, min(DIGEST, words - k), source + k * 4, a.digests + n * DIGEST_BYTES, a.stale)
        n += 1
    return n


@jit
def digested_blocks(words):
    """Blocks of weights, each with a digest of its own."""
    return (words + DIGEST - 1) // DIGEST
